//! Tunnels that answer no probe are judged by their handshakes. And tunnels that one of the ends asks both to stop
//! using.

use super::detector::{Fault, Settings, Transition, Tunnel};
use super::estimate::RoundTrip;
use super::nanos::{Nanos, SECOND};

fn tunnel() -> Tunnel {
    let settings = Settings { interval: SECOND / 10, down_after: 3, up_after: 5 };
    Tunnel::new(settings, true, RoundTrip::default(), SECOND)
}

/// Polls ten times a second. Returns the changes of state and their seconds.
fn play(
    tunnel: &mut Tunnel,
    from: Nanos,
    to: Nanos,
    mut each: impl FnMut(&mut Tunnel, Nanos),
) -> Vec<(Nanos, Transition)> {
    let mut transitions = Vec::new();
    for now in (from * 10..to * 10).map(|tenth| tenth * SECOND / 10) {
        each(tunnel, now);
        transitions.extend(tunnel.poll(now).transition.map(|transition| (now / SECOND, transition)));
    }
    transitions
}

#[test]
fn without_answers_a_session_that_is_not_renewed_is_a_dead_tunnel() {
    let mut tunnel = tunnel();
    // Renewed every two minutes, until the far end is gone.
    let transitions =
        play(&mut tunnel, 1, 1000, |tunnel, now| tunnel.on_handshake((now / (120 * SECOND)).min(5) * 120 * SECOND));
    assert_eq!(transitions, [(790, Transition::Down(Fault::NoHandshake))]);
    let transitions = play(&mut tunnel, 1000, 1100, |tunnel, now| tunnel.on_handshake(now.min(1050 * SECOND)));
    assert_eq!(transitions, [(1000, Transition::Up)]);
}

#[test]
fn a_site_that_never_shakes_hands_is_given_up_and_found_again() {
    let mut tunnel = tunnel();
    assert_eq!(
        play(&mut tunnel, 1, 250, |tunnel, _| tunnel.on_handshake(0)),
        [(191, Transition::Down(Fault::NoHandshake))]
    );
    assert_eq!(play(&mut tunnel, 250, 300, |tunnel, _| tunnel.on_handshake(260 * SECOND)), [(250, Transition::Up)]);
    // Without any look at its handshakes a tunnel is not judged.
    let mut unseen = self::tunnel();
    assert_eq!(play(&mut unseen, 1, 1000, |_, _| {}), []);
}

/// Answers every probe at once.
fn answer(tunnel: &mut Tunnel, now: Nanos) -> Option<Transition> {
    let step = tunnel.poll(now);
    if let Some(sequence) = step.send {
        tunnel.answered(sequence, now + 1_000_000);
    }
    step.transition
}

#[test]
fn a_tunnel_that_is_to_be_left_carries_nothing_until_it_may_and_answers_again() {
    let mut tunnel = tunnel();
    let mut transitions = Vec::new();
    for tenth in 10..60 {
        tunnel.set_withheld((30..40).contains(&tenth));
        transitions.extend(answer(&mut tunnel, tenth * SECOND / 10).map(|transition| (tenth, transition)));
    }
    // The first of the five answers belongs to the last probe before.
    assert_eq!(transitions, [(30, Transition::Withheld), (44, Transition::Up)]);
}

#[test]
fn a_tunnel_that_is_withheld_is_not_failing_and_gets_its_time_afterwards() {
    let mut tunnel = tunnel();
    assert_eq!(tunnel.failing_since(), None);
    for tenth in 10..200 {
        tunnel.set_withheld((30..90).contains(&tenth));
        // It answers, until its keys are changed.
        if tenth < 80 {
            answer(&mut tunnel, tenth * SECOND / 10);
        } else {
            tunnel.poll(tenth * SECOND / 10);
        }
        let expected = (tenth >= 90).then_some(89 * SECOND / 10);
        assert_eq!(tunnel.failing_since(), expected, "{tenth}");
    }
}

#[test]
fn a_tunnel_that_answered_before_is_not_given_three_minutes() {
    let mut known = tunnel();
    known.remember_answers();
    let [(at, transition)] = play(&mut known, 1, 100, |_, _| {})[..] else { panic!() };
    assert!(at <= 5 && matches!(transition, Transition::Down(Fault::Silent)), "{at} {transition:?}");
    assert_eq!(play(&mut tunnel(), 1, 100, |_, _| {}), [], "the other end may not be up yet");
}

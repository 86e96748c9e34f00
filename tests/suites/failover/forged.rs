//! What an unprivileged user of one gateway can send through its tunnels.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::hostile::{allow_ping, as_nobody, echo_request, forged, ping_socket};
use lab::kind::Kind;
use lab::sites::Lab;

use super::stage::{ALL, describe, lab, live, of_tunnels, views, wait_until_settled};

const LASTS: Duration = Duration::from_secs(8);
/// Time between two rounds. Each round sends two forged reports through every tunnel.
const GAP: Duration = Duration::from_millis(20);

/// Sends forged reports through every tunnel of the first site's gateway, as a user without any privilege, until
/// `stop`. Returns the number of reports for each tunnel.
fn forge(lab: &Lab, stop: &AtomicBool) -> Result<u64> {
    let gateway = &lab.sites[0].gateway;
    allow_ping(gateway)?;
    as_nobody(gateway, || {
        let sockets = lab.tunnels.iter().map(|tunnel| ping_socket(tunnel.addresses, 0));
        let sockets = sockets.collect::<Result<Vec<_>>>()?;
        let mut sent = 0;
        for at in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            for former in [false, true] {
                let message = echo_request(&forged(at, former));
                for socket in &sockets {
                    // A busy tunnel may have no room.
                    let _ = socket.send(&message);
                }
                sent += 1;
            }
            thread::sleep(GAP);
        }
        Ok(sent)
    })
}

/// Somebody without privilege forges reports of one site. The other site keeps all its tunnels in use, restarts none,
/// and says what happens.
pub fn forged_reports_take_no_tunnel_out_of_use(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    wait_until_settled(&lab, &views, &mut running)?;
    let stop = AtomicBool::new(false);
    let restarts = of_tunnels(&lab.stats(1)?, "restarts")?;
    thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| forge(&lab, &stop));
        let begin = Instant::now();
        let mut left = None;
        while begin.elapsed() < LASTS && !sender.is_finished() {
            left = left.or(Some(live(&views[1])).filter(|live| *live != ALL));
            thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().expect("the sender does not panic")?;
        ensure!(sent >= 100, "only {sent} reports were sent through each tunnel");
        ensure!(left.is_none(), "of the far site's tunnels only {left:?} were in use:{}", describe(&running));
        Ok(())
    })?;
    ensure!(of_tunnels(&lab.stats(1)?, "restarts")? == restarts, "tunnels were restarted:{}", describe(&running));
    ensure!(running[1].output().contains("did not send for this tunnel"), "{}", running[1].output());
    Ok(())
}

//! The links to measure on. Pure.

use clap::ValueEnum;
use lab::comparison::Links;

/// Payload of the RTP-like stream, as a share of the links' sum: 250 of 300 Mbit/s.
const SHARE: f64 = 250.0 / 300.0;

/// Links between the sites, and what runs at the far one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Profile {
    /// Three tunnels of 100 Mbit/s, 2 ms each way.
    Equal,
    /// As equal, with a queue for each flow at the ports.
    Fair,
    /// As equal, the second tunnel slower by 5 ms.
    Slower,
    /// Two tunnels of 50 Mbit/s, the second slower by 20 ms.
    Apart,
    /// Two tunnels of 50 Mbit/s, each with a delay of 7 ms that varies by 5 ms up and down with each packet. Packets of
    /// one tunnel stay in order.
    Jitter,
    /// As equal, the second tunnel loses 0.1% of the packets.
    Lossy,
    /// As equal, the far site is a gateway without ecmpvpn: WireGuard and the kernel's ECMP.
    Plain,
}

impl Profile {
    /// The word on the command line and in JSON.
    pub fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// A description for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Equal => "3 x 100 Mbit/s, 2 ms",
            Self::Fair => "3 x 100 Mbit/s, 2 ms, fair queues",
            Self::Slower => "3 x 100 Mbit/s, one slower by 5 ms",
            Self::Apart => "2 x 50 Mbit/s, 20 ms apart",
            Self::Jitter => "2 x 50 Mbit/s, 5 ms jitter",
            Self::Lossy => "3 x 100 Mbit/s, 0.1% lost on one",
            Self::Plain => "3 x 100 Mbit/s, far end without ecmpvpn",
        }
    }

    pub fn links(self) -> Links {
        let equal = Links::alike(true, 100.0);
        let two = Links { rates: vec![50.0; 2], ..equal.clone() };
        match self {
            Self::Equal => equal,
            Self::Fair => Links { fair_queues: true, ..equal },
            Self::Slower => Links { delays: vec![0.0, 5.0, 0.0], ..equal },
            Self::Apart => Links { delays: vec![0.0, 20.0], ..two },
            Self::Jitter => Links { delays: vec![5.0; 2], jitter: 5.0, ..two },
            Self::Lossy => Links { losses: vec![0.0, 0.1, 0.0], ..equal },
            Self::Plain => Links { plain_far_end: true, ..equal },
        }
    }

    /// Rate of the RTP-like stream, 10^6 bits of payload a second.
    pub fn stream_rate(self) -> f64 {
        self.links().rates.iter().sum::<f64>() * SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tunnel_is_never_the_worse_one() {
        for profile in Profile::value_variants() {
            let links = profile.links();
            let least = links.delays.iter().copied().fold(f64::INFINITY, f64::min);
            assert!(links.delays.first().is_none_or(|first| *first <= least), "{profile:?}");
            assert!(links.losses.first().is_none_or(|first| *first <= 0.0), "{profile:?}");
        }
        assert!((Profile::Equal.stream_rate() - 250.0).abs() < 1e-9);
        assert!((Profile::Apart.stream_rate() - 250.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn jitter_never_needs_a_negative_delay() {
        let links = Profile::Jitter.links();
        let delay = links.wire.unwrap().as_secs_f64() * 1e3 + links.delays[0];
        assert!(delay >= links.jitter, "{delay}");
    }
}

//! The transports. Pure.

use clap::ValueEnum;

/// A transport, or traffic of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Transport {
    /// One TCP flow (cubic).
    Tcp,
    /// One QUIC flow, cubic.
    Quic,
    /// One QUIC flow, BBR.
    QuicBbr,
    /// One QUIC flow, New Reno.
    QuicNewReno,
    /// An RTP-like stream of paced datagrams, with 83% of the links' sum.
    Rtp,
    /// One TCP flow in a WireGuard tunnel between the hosts, which the gateways see as one UDP flow.
    Wireguard,
    /// Three bulk flows: QUIC between two of TCP.
    Mixed3,
    /// Twelve bulk flows, TCP and QUIC in turn.
    Mixed12,
    /// 48 bulk flows, TCP and QUIC in turn.
    Mixed48,
    /// 200 short TCP transfers and an interactive stream beside one bulk TCP flow.
    Short,
}

impl Transport {
    /// The word on the command line and in JSON.
    pub fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub fn named(word: &str) -> Option<Self> {
        Self::from_str(word, false).ok()
    }

    /// A description for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Quic => "QUIC",
            Self::QuicBbr => "QUIC, BBR",
            Self::QuicNewReno => "QUIC, New Reno",
            Self::Rtp => "RTP-like UDP",
            Self::Wireguard => "WireGuard inside",
            Self::Mixed3 => "3 flows, TCP and QUIC",
            Self::Mixed12 => "12 flows, TCP and QUIC",
            Self::Mixed48 => "48 flows, TCP and QUIC",
            Self::Short => "TCP, short transfers beside",
        }
    }
}

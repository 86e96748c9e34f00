//! What a flow over all tunnels must reach. Pure.

use crate::profile::Profile;
use crate::transport::Transport;

/// As fast as one tunnel. Less than 1, since the same flow sent twice over one tunnel differs by so much.
const AS_ONE: f64 = 0.97;

/// What each seed must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Target {
    /// Least ratio to one tunnel.
    pub ratio: f64,
    /// Greatest share out of order, 0 to 1.
    pub out_of_order: Option<f64>,
    /// Least goodput of the slowest of several flows, as a share of their mean.
    pub least_share: Option<f64>,
}

impl Target {
    pub fn of(profile: Profile, transport: Transport, policy: &str) -> Self {
        // The default policy may keep a flow whole where spreading it is no safe gain.
        let is_whole = policy == "adaptive" && !matches!(profile, Profile::Equal | Profile::Fair | Profile::Slower);
        let tcp = match profile {
            Profile::Equal | Profile::Fair => 2.9,
            Profile::Slower | Profile::Plain => 2.6,
            Profile::Apart | Profile::Jitter => 1.6,
            Profile::Lossy => 2.0,
        };
        let quic = match profile {
            Profile::Equal | Profile::Fair => 2.6,
            Profile::Slower => 2.4,
            Profile::Apart => 1.5,
            Profile::Jitter => 1.6,
            Profile::Lossy => 2.0,
            Profile::Plain => AS_ONE,
        };
        let ratio = match transport {
            Transport::Tcp if !is_whole => tcp,
            Transport::Quic if !is_whole => quic,
            Transport::Mixed3 | Transport::Mixed12 | Transport::Mixed48
                if matches!(profile, Profile::Equal | Profile::Fair) =>
            {
                2.9
            }
            _ => AS_ONE,
        };
        let out_of_order = match profile {
            Profile::Equal | Profile::Fair | Profile::Plain => Some(1e-4),
            Profile::Slower | Profile::Apart => Some(1e-3),
            Profile::Jitter => Some(5e-3),
            Profile::Lossy => None,
        };
        let is_mixed = matches!(transport, Transport::Mixed3 | Transport::Mixed12 | Transport::Mixed48);
        Self {
            ratio,
            out_of_order: out_of_order.filter(|_| transport == Transport::Rtp),
            least_share: is_mixed.then_some(0.8),
        }
    }

    pub fn words(&self) -> String {
        let order = self.out_of_order.map(|most| format!(", out of order <= {:.2}%", most * 100.0));
        let share = self.least_share.map(|least| format!(", slowest flow >= {least:.1} of the mean"));
        format!("each >= {:.2}{}{}", self.ratio, order.unwrap_or_default(), share.unwrap_or_default())
    }

    /// Whether the worst of all seeds meets the target.
    pub fn is_met(&self, least_ratio: f64, most_out_of_order: f64, least_share: f64) -> bool {
        least_ratio >= self.ratio
            && self.out_of_order.is_none_or(|most| most_out_of_order <= most)
            && self.least_share.is_none_or(|least| least_share >= least)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::float_cmp, reason = "these are exact")]

    use super::*;

    #[test]
    fn a_target_is_for_the_worst_seed() {
        let target = Target::of(Profile::Equal, Transport::Rtp, "adaptive");
        assert_eq!(target, Target { ratio: AS_ONE, out_of_order: Some(1e-4), least_share: None });
        assert!(target.is_met(0.97, 1e-4, 0.0) && !target.is_met(0.96, 0.0, 0.0) && !target.is_met(2.0, 2e-4, 0.0));
        let several = Target::of(Profile::Equal, Transport::Mixed12, "adaptive");
        assert!(several.is_met(2.9, 1.0, 0.8) && !several.is_met(2.9, 0.0, 0.79) && !several.is_met(2.8, 0.0, 1.0));
        assert_eq!(target.words(), "each >= 0.97, out of order <= 0.01%");
    }

    #[test]
    fn the_default_policy_may_keep_flows_whole_on_bad_links_only() {
        let ratio = |profile, policy| Target::of(profile, Transport::Quic, policy).ratio;
        assert_eq!([ratio(Profile::Equal, "adaptive"), ratio(Profile::Equal, "spray")], [2.6, 2.6]);
        assert_eq!([ratio(Profile::Apart, "adaptive"), ratio(Profile::Apart, "spray")], [AS_ONE, 1.5]);
        assert_eq!(Target::of(Profile::Lossy, Transport::Wireguard, "spray").ratio, AS_ONE);
    }
}

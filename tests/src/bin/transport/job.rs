//! A part of the work that runs by itself: one profile with one seed. Pure.

use clap::ValueEnum as _;

use crate::profile::Profile;

/// One profile with one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub profile: Profile,
    pub seed: u64,
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.profile.word(), self.seed)
    }
}

impl std::str::FromStr for Job {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (profile, seed) = text.split_once('/').ok_or("not PROFILE/SEED")?;
        let seed = seed.parse().map_err(|_| "no number of a seed")?;
        Ok(Self { profile: Profile::from_str(profile, false)?, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_as_they_are_named() {
        for profile in Profile::value_variants() {
            let job = Job { profile: *profile, seed: 7 };
            assert_eq!(job.to_string().parse(), Ok(job));
        }
        for wrong in ["", "equal", "equal/", "equal/x", "nothing/1", "equal/1/2"] {
            assert!(wrong.parse::<Job>().is_err(), "{wrong}");
        }
    }
}

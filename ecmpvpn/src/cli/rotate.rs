//! The flags of `rotate`.

use std::path::PathBuf;

use clap::Args;

/// `rotate`
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn rotate --prepare",
    after_long_help = "Example, from a session that itself goes over the VPN:\n  \
        sudo ecmpvpn rotate --prepare --output for-site-b\n  \
        sudo scp -p for-site-b root@site-b:\n  \
        ssh root@site-b ecmpvpn rotate --apply for-site-b\n  \
        sudo ecmpvpn rotate"
)]
pub struct RotateArgs {
    /// Make new keys, and the file for the other site; changes no tunnel.
    #[arg(long, group = "what")]
    pub prepare: bool,

    /// Take the file that the other site prepared; changes no tunnel until the other site does.
    #[arg(long, value_name = "FILE", group = "what")]
    pub apply: Option<PathBuf>,

    /// Give up the rotation: tunnels that have new keys already keep them, the others keep their former keys.
    #[arg(long, group = "what")]
    pub abort: bool,

    /// Show the progress of the rotation.
    #[arg(long, group = "what")]
    pub status: bool,

    /// Print one JSON object on standard output.
    #[arg(long, requires = "status")]
    pub json: bool,

    /// Name of the other site; needed if there are several.
    #[arg(long, value_name = "NAME", requires = "prepare")]
    pub peer: Option<String>,

    /// File to write for the other site [default: `keys-for-PEER` beside the configuration].
    #[arg(short, long, value_name = "FILE", requires = "prepare")]
    pub output: Option<PathBuf>,
}

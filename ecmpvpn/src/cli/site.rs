//! The flag that names a site.

use clap::Args;

use crate::config::is_site_name;

/// Of commands on a running site, which need only its name.
#[derive(Args, Clone, Debug)]
pub struct SiteArgs {
    /// The site, if its configuration cannot be read [default: the name in the configuration].
    #[arg(long, value_name = "NAME", value_parser = site_name)]
    pub site: Option<String>,
}

/// Parses the name of a site. The error says what a name is.
pub fn site_name(text: &str) -> Result<String, String> {
    let rule = "give 1 to 32 letters, digits, dots, dashes or underscores, no dot first";
    if is_site_name(text) { Ok(text.to_owned()) } else { Err(rule.to_owned()) }
}

//! Parses arbitrary text as a configuration. The parser must refuse it with a reason, or must read the same again from
//! what `render` writes.

#![no_main]

use ecmpvpn::config::{Config, KeyFileError, Problems, parse, render};
use ecmpvpn_fuzz::assert_sound;
use libfuzzer_sys::fuzz_target;
use zeroize::Zeroizing;

/// The bytes from 1 to 32: the contents of every key file.
const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=\n";

fuzz_target!(|text: &str| {
    let config = match read(text) {
        Ok(config) => config,
        Err(problems) => return assert_sound(&problems, text),
    };
    let rendered = render(&config);
    match read(&rendered) {
        Ok(again) => assert_eq!(again, config, "{rendered}"),
        Err(problems) => panic!("what is rendered is refused:\n{problems}\n{rendered}"),
    }
});

fn read(text: &str) -> Result<Config, Problems> {
    parse(text, "f", &|file| match file {
        // Names that `render` never gives to a file.
        "gone" => Err(KeyFileError::Missing(file.into())),
        "junk" => Ok(Zeroizing::new("junk\n".to_owned())),
        _ => Ok(Zeroizing::new(KEY.to_owned())),
    })
}

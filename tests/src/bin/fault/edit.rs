//! Edits the text of a configuration, as an operator with an editor would. Pure.

use anyhow::{Context as _, Result};

const TUNNEL: &str = "[[peer.tunnel]]";
/// A prefix that is added and removed. It has no hosts.
const PREFIX: &str = "\"10.99.0.0/16\", ";

/// Splits a configuration into blocks, each from its header to the next.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        if line.starts_with('[') {
            blocks.push(String::new());
        }
        let block = blocks.last_mut().expect("there is one");
        block.push_str(line);
        block.push('\n');
    }
    blocks
}

fn is_tunnel(block: &str, name: &str) -> bool {
    block.starts_with(TUNNEL) && block.contains(&format!("\"{name}\""))
}

/// Sets the numeric value of `key` in one tunnel.
pub fn set(text: &str, tunnel: &str, key: &str, value: u16) -> Result<String> {
    let mut blocks = blocks(text);
    let block = blocks.iter_mut().find(|block| is_tunnel(block, tunnel)).with_context(|| format!("no {tunnel}"))?;
    let is_key = |line: &str| line.split_once('=').is_some_and(|(name, _)| name.trim() == key);
    let line = |line: &str| if is_key(line) { format!("{key} = {value}\n") } else { format!("{line}\n") };
    *block = block.lines().map(line).collect();
    Ok(blocks.concat())
}

/// Removes a tunnel. Returns the rest, and the tunnel's block.
pub fn take_out(text: &str, tunnel: &str) -> Result<(String, String)> {
    let (taken, rest): (Vec<String>, Vec<String>) =
        blocks(text).into_iter().partition(|block| is_tunnel(block, tunnel));
    Ok((rest.concat(), taken.into_iter().next().with_context(|| format!("no {tunnel}"))?))
}

/// Inserts a tunnel's block behind the last tunnel.
pub fn put_in(text: &str, block: &str) -> Result<String> {
    let mut blocks = blocks(text);
    let last = blocks.iter().rposition(|block| block.starts_with(TUNNEL)).context("no tunnel at all")?;
    blocks.insert(last + 1, block.to_owned());
    Ok(blocks.concat())
}

/// Adds the prefix behind the peer, or removes it if it is there.
pub fn turn_prefix(text: &str) -> String {
    if text.contains(PREFIX) {
        text.replace(PREFIX, "")
    } else {
        text.replacen("\nprefixes = [", &format!("\nprefixes = [{PREFIX}"), 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Comment.\n[site]\nname = \"a\"\n\n[[peer]]\nprefixes = [\"10.20.0.0/16\"]\n[[peer.tunnel]]\nname = \
                        \"wg0\"\nweight = 1 # share\n[[peer.tunnel]]\nname = \"wg1\"\nweight = 1\n\n[health]\nup = 5\n";

    #[test]
    fn one_number_of_one_tunnel_is_set() {
        let text = set(TEXT, "wg1", "weight", 3).unwrap();
        assert_eq!(text, TEXT.replace("weight = 1\n", "weight = 3\n"));
        let text = set(TEXT, "wg0", "weight", 3).unwrap();
        assert_eq!(text, TEXT.replace("weight = 1 # share", "weight = 3"));
        assert!(set(TEXT, "wg2", "weight", 3).is_err());
    }

    #[test]
    fn what_is_taken_out_and_put_in_again_is_the_same() {
        let (rest, block) = take_out(TEXT, "wg1").unwrap();
        assert!(!rest.contains("wg1") && rest.contains("wg0") && rest.contains("[health]"));
        assert_eq!(put_in(&rest, &block).unwrap(), TEXT);
    }

    #[test]
    fn the_prefix_comes_and_goes() {
        let with = turn_prefix(TEXT);
        assert!(with.contains("prefixes = [\"10.99.0.0/16\", \"10.20.0.0/16\"]"), "{with}");
        assert_eq!(turn_prefix(&with), TEXT);
    }
}

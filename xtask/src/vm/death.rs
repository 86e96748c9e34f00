//! Finds why a virtual machine died, from its kernel's last messages.
//!
//! An emulated CPU may run stale code. While the kernel changes an instruction, it replaces it by a breakpoint (`int3`,
//! byte cc) for a moment. QEMU before 8.1 can translate that breakpoint on one CPU just when another one removes it,
//! and keeps the translation. The kernel then dies of a breakpoint that is no longer in its memory. No real CPU and no
//! program under test can cause that.

use std::fmt;

/// A machine that died while its command ran.
#[derive(Debug)]
pub struct Died {
    /// The kernel's message, for people.
    pub why: String,
    /// Whether the last oops proves that an emulated CPU ran stale code.
    pub by_stale_code: bool,
}

impl fmt::Display for Died {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the virtual machine died while the command ran: {}", self.why)
    }
}

impl std::error::Error for Died {}

/// Whether `console` ends with an oops from a breakpoint that is not in memory.
pub fn is_stale_code(console: &str) -> bool {
    let lines: Vec<&str> = console.lines().map(message).collect();
    // `die()` numbers its messages: `Oops: int3: 0000 [#1] PREEMPT SMP NOPTI`; before Linux 6.11 without the first
    // word.
    let Some(last) = lines.iter().rposition(|line| line.contains(": 0000 [#") || line.contains("Oops: ")) else {
        return false;
    };
    let after = &lines[last..];
    let is_int3 = after[0].strip_prefix("Oops: ").unwrap_or(after[0]).starts_with("int3: ");
    let is_fatal = after.iter().any(|line| line.starts_with("Kernel panic - not syncing: Fatal exception"));
    let code = after.iter().find_map(|line| line.strip_prefix("Code: "));
    is_int3 && is_fatal && code.and_then(executed).is_some_and(|byte| byte != "cc")
}

/// The byte in memory at the executed breakpoint. It is the byte before `<..>`: after a trap the CPU is at the next
/// byte.
fn executed(code: &str) -> Option<&str> {
    let bytes: Vec<&str> = code.split_whitespace().collect();
    let at = bytes.iter().position(|byte| byte.starts_with('<'))?;
    bytes.get(at.checked_sub(1)?).copied().filter(|byte| byte.len() == 2)
}

/// A kernel message without its time stamp.
fn message(line: &str) -> &str {
    let text = line.trim_end();
    text.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(text, |(_, message)| message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(oops: &str, code: &str, end: &str) -> String {
        format!(
            "[    3.1] booted\r\n[   52.710001] {oops}\r\n[   52.710502] CPU: 1 PID: 812 Comm: host Not tainted\r\n\
             [   52.711800] RIP: 0010:__alloc_skb+0x49/0x1e0\r\n[   52.712345] Code: {code}\r\n\
             [   52.713000] Call Trace:\r\n[   52.714000]  <IRQ>\r\n[   52.720000] {end}\r\n"
        )
    }

    const RESTORED: &str = "48 8b 1d 7f 3a e9 <2c> 01 00 00 48";
    const STILL_THERE: &str = "48 8b 1d 7f 3a cc <2c> 01 00 00 48";
    const PANIC: &str = "Kernel panic - not syncing: Fatal exception in interrupt";

    #[test]
    fn a_breakpoint_that_is_gone_is_the_emulators() {
        assert!(is_stale_code(&console("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", RESTORED, PANIC)));
        assert!(is_stale_code(&console("int3: 0000 [#1] PREEMPT SMP NOPTI", RESTORED, PANIC)));
    }

    #[test]
    fn a_breakpoint_that_is_there_is_not() {
        assert!(!is_stale_code(&console("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", STILL_THERE, PANIC)));
        let unreadable = "Unable to access opcode bytes at 0xffffffff81000000.";
        assert!(!is_stale_code(&console("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", unreadable, PANIC)));
    }

    #[test]
    fn other_deaths_are_not() {
        for oops in [
            "Oops: general protection fault, probably for non-canonical address 0x1: 0000 [#1] PREEMPT SMP NOPTI",
            "Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [int3: 0000]",
        ] {
            assert!(!is_stale_code(&console(oops, RESTORED, PANIC)), "{oops}");
        }
        let lived_on = console("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", RESTORED, "reboot: Power down");
        assert!(!is_stale_code(&lived_on));
        assert!(!is_stale_code("") && !is_stale_code("Kernel panic - not syncing: Out of memory"));
        // The last one counts.
        let first = console("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", RESTORED, PANIC);
        let then = console("Oops: 0002 [#2] PREEMPT SMP NOPTI", RESTORED, PANIC);
        assert!(!is_stale_code(&format!("{first}{then}")) && is_stale_code(&format!("{then}{first}")));
    }
}

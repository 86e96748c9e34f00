//! Words in map memory that the kernel and other processes read and write at any time.

use core::cell::UnsafeCell;

/// A word that others may change between any two looks at it. Each look and each write is one instruction; nothing is
/// ordered by them, and nothing needs to be: a stale value is as good as a packet a moment earlier.
///
/// BPF has no atomic types below 64 bits, so these are volatile accesses there.
#[repr(transparent)]
#[derive(Default)]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: there are only whole-word accesses, and no reference to the word is ever given out.
unsafe impl<T: Word> Sync for Shared<T> {}

/// An unsigned integer that is read and written in one instruction.
pub trait Word: Copy + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! words {
    ($($word:ty),*) => {
        $(
            impl private::Sealed for $word {}
            impl Word for $word {}
        )*
    };
}
words!(u8, u32, u64);

impl<T: Word> Shared<T> {
    /// With a first value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// What it is now.
    #[inline(always)]
    pub fn get(&self) -> T {
        // SAFETY: the pointer is valid and aligned, because `self` is.
        unsafe { self.0.get().read_volatile() }
    }

    /// Makes it `value`.
    #[inline(always)]
    pub fn set(&self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.get().write_volatile(value) };
    }
}

#[cfg(target_has_atomic = "32")]
impl Shared<u32> {
    /// Sets or clears `bits` without losing what others do to the other bits; returns the former value.
    pub fn set_bits(&self, bits: u32, on: bool) -> u32 {
        use core::sync::atomic::{AtomicU32, Ordering};

        // SAFETY: the pointer is valid and aligned as long as `self` lives.
        let word = unsafe { AtomicU32::from_ptr(self.0.get()) };
        if on { word.fetch_or(bits, Ordering::Relaxed) } else { word.fetch_and(!bits, Ordering::Relaxed) }
    }
}

impl<T: Word> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self::new(self.get())
    }
}

impl<T: Word + core::fmt::Debug> core::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_and_cleared() {
        let word = Shared::new(0b0101u32);
        assert_eq!(word.set_bits(0b0010, true), 0b0101);
        assert_eq!(word.set_bits(0b0001, false), 0b0111);
        assert_eq!(word.get(), 0b0110);
        word.set(9);
        assert_eq!(word.get(), 9);
    }
}

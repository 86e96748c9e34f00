//! Words in map memory that the kernel and other processes read and write at any time.

use core::cell::UnsafeCell;

/// A word that others may change between any two reads. Each read and each write is one instruction. They do not order
/// other accesses, and need not: a stale value is as good as a packet a moment earlier.
///
/// The accesses are volatile, because BPF has no atomic types below 64 bits.
#[repr(transparent)]
#[derive(Default)]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: there are only whole-word accesses, and no reference to the word is ever given out.
unsafe impl<T: MachineWord> Sync for Shared<T> {}

/// An unsigned integer that is read and written in one instruction.
pub trait MachineWord: Copy + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! words {
    ($($word:ty),*) => {
        $(
            impl private::Sealed for $word {}
            impl MachineWord for $word {}
        )*
    };
}
words!(u8, u32, u64);

impl<T: MachineWord> Shared<T> {
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    #[inline(always)]
    pub fn get(&self) -> T {
        // SAFETY: the pointer is valid and aligned, because `self` is.
        unsafe { self.0.get().read_volatile() }
    }

    #[inline(always)]
    pub fn set(&self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.get().write_volatile(value) };
    }
}

#[cfg(target_has_atomic = "32")]
impl Shared<u32> {
    /// Sets or clears `bits` atomically: changes that others make to other bits are not lost. Returns the former value.
    pub fn set_bits(&self, bits: u32, on: bool) -> u32 {
        use core::sync::atomic::{AtomicU32, Ordering};

        // SAFETY: the pointer is valid and aligned as long as `self` lives.
        let word = unsafe { AtomicU32::from_ptr(self.0.get()) };
        if on { word.fetch_or(bits, Ordering::Relaxed) } else { word.fetch_and(!bits, Ordering::Relaxed) }
    }
}

/// A record that is written word by word while others read it. They may see some words of the former record.
#[repr(transparent)]
pub struct Whole<T>(UnsafeCell<T>);

// SAFETY: a `T` consists of plain words, which are read and written one by one. Whoever takes a reference is
// responsible for its use.
unsafe impl<T: Copy + Send> Sync for Whole<T> {}

impl<T: Copy> Whole<T> {
    const WORDS: usize = size_of::<T>() / size_of::<u32>();
    const FITS: () = assert!(size_of::<T>().is_multiple_of(size_of::<u32>()) && align_of::<T>() >= align_of::<u32>());

    pub const fn new(value: T) -> Self {
        let () = Self::FITS;
        Self(UnsafeCell::new(value))
    }

    pub fn get(&self) -> T {
        let mut copy = core::mem::MaybeUninit::<T>::uninit();
        let (from, to) = (self.0.get().cast::<u32>(), copy.as_mut_ptr().cast::<u32>());
        for word in 0..Self::WORDS {
            // SAFETY: both have `WORDS` words, and are aligned for them.
            unsafe { to.add(word).write(from.add(word).read_volatile()) };
        }
        // SAFETY: every word is written, and any words are a valid `T`: the record has plain integers only.
        unsafe { copy.assume_init() }
    }

    pub fn set(&self, value: T) {
        let (from, to) = ((&raw const value).cast::<u32>(), self.0.get().cast::<u32>());
        for word in 0..Self::WORDS {
            // SAFETY: as in `get`.
            unsafe { to.add(word).write_volatile(from.add(word).read()) };
        }
    }

    /// For BPF programs, which read single words. The host uses [`Self::get`].
    ///
    /// # Safety
    /// Words may change at any time. The caller must not assume that two reads of a word return the same value.
    #[inline(always)]
    pub unsafe fn look(&self) -> &T {
        // SAFETY: the pointer is valid and aligned. The caller expects words to change.
        unsafe { &*self.0.get() }
    }
}

impl<T: MachineWord> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self::new(self.get())
    }
}

impl<T: MachineWord + core::fmt::Debug> core::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_record_is_what_was_written() {
        let record = Whole::new((1u32, [2u32; 3]));
        record.set((7, [8, 9, 10]));
        assert_eq!(record.get(), (7, [8, 9, 10]));
    }

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

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

/// A record that is written as a whole, word by word, while others look at it: they may see some words of the former one.
#[repr(transparent)]
pub struct Whole<T>(UnsafeCell<T>);

// SAFETY: a `T` is plain words, which are read and written one by one; whoever asks for a reference answers for it.
unsafe impl<T: Copy + Send> Sync for Whole<T> {}

impl<T: Copy> Whole<T> {
    const WORDS: usize = size_of::<T>() / size_of::<u32>();
    const FITS: () = assert!(size_of::<T>().is_multiple_of(size_of::<u32>()) && align_of::<T>() >= align_of::<u32>());

    /// With a first value.
    pub const fn new(value: T) -> Self {
        let () = Self::FITS;
        Self(UnsafeCell::new(value))
    }

    /// What it is now.
    pub fn get(&self) -> T {
        let mut copy = core::mem::MaybeUninit::<T>::uninit();
        let (from, to) = (self.0.get().cast::<u32>(), copy.as_mut_ptr().cast::<u32>());
        for word in 0..Self::WORDS {
            // SAFETY: both have so many words, and are aligned for them.
            unsafe { to.add(word).write(from.add(word).read_volatile()) };
        }
        // SAFETY: every word is written, and any words are a valid `T`: the record has plain integers only.
        unsafe { copy.assume_init() }
    }

    /// Makes it `value`.
    pub fn set(&self, value: T) {
        let (from, to) = ((&raw const value).cast::<u32>(), self.0.get().cast::<u32>());
        for word in 0..Self::WORDS {
            // SAFETY: as in `get`.
            unsafe { to.add(word).write_volatile(from.add(word).read()) };
        }
    }

    /// For BPF programs, which look at single words. On the host [`Self::get`] is the way.
    ///
    /// # Safety
    /// A word that is looked at twice may have changed meanwhile.
    #[inline(always)]
    pub unsafe fn look(&self) -> &T {
        // SAFETY: the pointer is valid and aligned; the caller answers for changes.
        unsafe { &*self.0.get() }
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

//! Segments that several hold.

use super::Segment;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// A [`Segment`] that several hold, and what goes with it; derefs to its bytes. Cloning gives another holder, the last one
/// lets go of both.
///
/// Its address stands in every handle: who reads the bytes does not read what the holders share, which for many thousand
/// segments would be as many lines that no cache has.
pub struct SharedSegment<T> {
    start: NonNull<u8>,
    len: usize,
    shared: Arc<(Segment, T)>,
}

// SAFETY: `start` is an address of the segment, which is `Send` and `Sync` as the value beside it is asked to be; a handle
// gives `&[u8]`, and `&mut [u8]` only where there is no other.
unsafe impl<T: Send + Sync> Send for SharedSegment<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for SharedSegment<T> {}

impl<T> SharedSegment<T> {
    /// Makes `segment` one that can have several holders, of whom this is the first. `with` lives as long as it does.
    pub fn new(segment: Segment, with: T) -> Self {
        Self { start: segment.start, len: segment.len, shared: Arc::new((segment, with)) }
    }

    /// The bytes to be written, if nobody else holds them.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        Arc::get_mut(&mut self.shared).map(|(segment, _)| &mut **segment)
    }

    /// Whether somebody else holds it.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }

    /// The segment itself and what went with it, if nobody else holds it.
    pub fn into_inner(self) -> Option<(Segment, T)> {
        Arc::into_inner(self.shared)
    }
}

impl<T> Clone for SharedSegment<T> {
    fn clone(&self) -> Self {
        Self { start: self.start, len: self.len, shared: Arc::clone(&self.shared) }
    }
}

impl<T> std::fmt::Debug for SharedSegment<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let holders = Arc::strong_count(&self.shared);
        f.debug_struct("SharedSegment").field("len", &self.len).field("holders", &holders).finish()
    }
}

impl<T> Deref for SharedSegment<T> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` and `len` are those of the segment, which `shared` keeps and nothing replaces: only
        // `into_inner` takes it out, and there this handle ends. Who writes has `&mut` of the only handle.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_holder_writes_and_takes() {
        let with = Arc::new(());
        let mut first = SharedSegment::new(Segment::new(100).expect("memory"), Arc::clone(&with));
        first.get_mut().expect("nobody else")[7] = 3;
        let mut second = first.clone();
        assert!(first.is_shared() && first.get_mut().is_none() && second.get_mut().is_none());
        assert_eq!((first.len(), first[7], &*second), (100, 3, &*first));
        assert!(first.into_inner().is_none(), "another one holds it");
        assert!(!second.is_shared());
        let read = std::thread::spawn(move || {
            second.get_mut().expect("nobody else")[7] += 1;
            second
        });
        let second = read.join().expect("no panic");
        assert_eq!((second[7], Arc::strong_count(&with)), (4, 2));
        let (segment, beside) = second.into_inner().expect("the last one");
        assert_eq!((segment[7], segment.len()), (4, 100));
        drop(beside);
        assert_eq!(Arc::strong_count(&with), 1, "it goes with the last holder");
    }
}

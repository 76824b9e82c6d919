//! Huge-page memory: one anonymous map, cut into segments that are owned apart from each other.
//!
//! Model weights and KV pages come from here. The map is zeroed by the operating system, its pages cost nothing until
//! they are touched, and a refusal (the address-space limit of a worker process) is an error with a number in it.

mod shared;

pub use shared::SharedSegment;

use crate::error::SysError;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a huge page, and the alignment of an arena that can hold one.
pub const HUGE_PAGE: usize = 2 << 20;

/// Alignment of every segment: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// The map itself; its bytes are reached only through the pointers of the segments cut from it.
struct Mapping {
    _map: memmap2::MmapMut,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory without affinity to a thread, and `Mapping` offers no access to it; the segments
// hold disjoint parts.
unsafe impl Send for Mapping {}
// SAFETY: as above: a shared `Mapping` gives access to nothing.
unsafe impl Sync for Mapping {}

/// A bump allocator over one anonymous map, which is released when the arena and all its segments are gone. A segment that
/// is only dropped keeps its memory until then; see [`Segment::release`].
pub struct Arena {
    mapping: Arc<Mapping>,
    used: usize,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("len", &self.mapping.len).field("used", &self.used).finish()
    }
}

impl Arena {
    /// Maps `bytes` of zeroed memory. From one huge page on, or with `huge`, the start lies on a 2-MiB boundary; with
    /// `huge` the kernel is also advised to use huge pages (`MADV_HUGEPAGE`; whether it did stands in
    /// [`crate::ProcessFacts::anon_huge_bytes`]).
    ///
    /// # Errors
    /// [`SysError::Memory`] with the number of bytes when the operating system or the address-space limit refuses.
    pub fn new(bytes: usize, huge: bool) -> Result<Self, SysError> {
        let slack = if huge || bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let refused = |bytes| move |source| SysError::Memory { bytes, source };
        // Rounded up to lines, so that the last segment may be padded like the others.
        let asked = bytes
            .checked_next_multiple_of(ALIGN)
            .and_then(|len| len.checked_add(slack))
            .filter(|&len| isize::try_from(len).is_ok())
            .ok_or_else(|| refused(bytes)(std::io::ErrorKind::OutOfMemory.into()))?;
        let mut map = memmap2::MmapMut::map_anon(asked.max(1)).map_err(refused(asked))?;
        let base = map.as_mut_ptr();
        let skip = if slack == 0 { 0 } else { base.align_offset(HUGE_PAGE) };
        #[cfg(target_os = "linux")]
        if huge {
            // Advice: a kernel without huge pages refuses it, and the memory is as good without.
            let _ = map.advise_range(memmap2::Advice::HugePage, skip, asked - skip);
        }
        // SAFETY: `skip` is less than HUGE_PAGE, which was added to the length, or 0: the result lies inside the map.
        let start = unsafe { base.add(skip) };
        let start =
            NonNull::new(start).ok_or_else(|| refused(asked)(std::io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { mapping: Arc::new(Mapping { _map: map, start, len: asked - slack }), used: 0 })
    }

    /// Cuts off the next `bytes`, zeroed and 64-byte aligned; `None` when fewer [remain](Arena::remaining).
    pub fn take(&mut self, bytes: usize) -> Option<Segment> {
        if bytes > self.remaining() {
            return None;
        }
        // SAFETY: `used <= len` of the mapping, so the pointer is inside it or one past its end.
        let start = unsafe { self.mapping.start.add(self.used) };
        // Padding cannot pass the end: the length of the mapping is a multiple of ALIGN.
        self.used += bytes.next_multiple_of(ALIGN);
        Some(Segment { mapping: Arc::clone(&self.mapping), start, len: bytes })
    }

    /// Bytes that can still be taken in one piece. Every segment uses up a multiple of 64 bytes.
    pub fn remaining(&self) -> usize {
        self.mapping.len - self.used
    }
}

/// A piece of an [`Arena`] that nobody else can reach; derefs to its bytes. It keeps the map alive.
pub struct Segment {
    mapping: Arc<Mapping>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a segment is the only way to its bytes, like a `Box<[u8]>`, and the memory has no thread affinity.
unsafe impl Send for Segment {}
// SAFETY: `&Segment` gives only `&[u8]`.
unsafe impl Sync for Segment {}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment").field("len", &self.len).field("map_bytes", &self.mapping.len).finish()
    }
}

impl Segment {
    /// A segment with a map of its own, on huge pages from 2 MiB up.
    ///
    /// # Errors
    /// [`SysError::Memory`], as [`Arena::new`].
    pub fn new(bytes: usize) -> Result<Self, SysError> {
        let mut arena = Arena::new(bytes, bytes >= HUGE_PAGE)?;
        arena.take(bytes).ok_or(SysError::Memory { bytes, source: std::io::ErrorKind::OutOfMemory.into() })
    }

    /// The bytes as elements of `T` (at most 64-byte aligned); a remainder that makes no whole element is left off.
    ///
    /// # Panics
    /// When `T` is aligned to more than 64 bytes or has no size.
    pub fn as_slice_of<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(&self[..self.len - self.len % size_of::<T>()])
    }

    /// The bytes as writable elements of `T`; see [`Segment::as_slice_of`].
    ///
    /// # Panics
    /// When `T` is aligned to more than 64 bytes or has no size.
    pub fn as_mut_slice_of<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let whole = self.len - self.len % size_of::<T>();
        bytemuck::cast_slice_mut(&mut self[..whole])
    }
}

impl Segment {
    /// Drops `segments` and gives their memory back to the system even where other segments keep their map alive: all
    /// whole pages of the system between the first and the last byte of segments that lie one after another, so that many
    /// are best released together. The addresses stay taken until the map goes. Advice only: where there is none, memory
    /// comes back with the map.
    pub fn release(mut segments: Vec<Segment>) {
        segments.sort_unstable_by_key(|segment| segment.start);
        let mut rest = segments.as_slice();
        while let Some(first) = rest.first() {
            let of_map = |s: &&Segment| Arc::ptr_eq(&s.mapping, &first.mapping);
            let (here, others) = rest.split_at(rest.iter().take_while(of_map).count());
            rest = others;
            // A map that nothing else holds is on its way out, in one piece.
            if Arc::strong_count(&first.mapping) > here.len() {
                first.mapping.release(here);
            }
        }
    }
}

impl Mapping {
    /// Gives back the whole pages of runs of `segments`: in ascending order, of this map, and about to be dropped.
    #[cfg(unix)]
    fn release(&self, segments: &[Segment]) {
        let page = rustix::param::page_size();
        let base = self._map.as_ptr() as usize;
        let ends = |s: &Segment| {
            let start = s.start.as_ptr() as usize - base;
            start..start + s.len.next_multiple_of(ALIGN)
        };
        let mut run = 0..0;
        // An empty run at the end closes the last one.
        let full = segments.iter().filter(|s| s.len > 0);
        for next in full.map(ends).chain(std::iter::once(0..0)) {
            if next.start == run.end && !next.is_empty() {
                run.end = next.end;
                continue;
            }
            // The map begins where a page does.
            let (start, end) = (run.start.next_multiple_of(page), run.end / page * page);
            if start < end {
                // SAFETY: the map is private and anonymous, so that pages read as zeros afterwards. These lie within
                // segments that are about to be dropped and that nothing else can reach, and in padding that is nobody's:
                // no byte that anybody reads changes.
                let _ = unsafe {
                    self._map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
            run = next;
        }
    }

    #[cfg(not(unix))]
    fn release(&self, _: &[Segment]) {}
}

impl Deref for Segment {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes lie in a live, zero-initialised map; segments are disjoint, so nothing but this value
        // reaches them, and `&self` excludes a writer.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Segment {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_zeroed_aligned_and_disjoint() {
        let mut arena = Arena::new(3 * HUGE_PAGE, true).expect("memory");
        assert_eq!(arena.mapping.start.as_ptr() as usize % HUGE_PAGE, 0);
        let sizes = [1usize, 63, 64, 65, 0, 4096, HUGE_PAGE + 1];
        let mut segments: Vec<Segment> =
            sizes.iter().map(|&bytes| arena.take(bytes).expect("it fits")).collect();
        for (i, segment) in segments.iter_mut().enumerate() {
            assert_eq!(segment.len(), sizes[i]);
            assert_eq!(segment.as_ptr() as usize % ALIGN, 0);
            assert!(segment.iter().all(|&byte| byte == 0));
            segment.fill(i as u8 + 1);
        }
        for (i, segment) in segments.iter().enumerate() {
            assert!(segment.iter().all(|&byte| byte == i as u8 + 1), "segment {i} was overwritten");
        }
    }

    #[test]
    fn an_arena_ends_where_it_was_asked_to() {
        let mut arena = Arena::new(200, false).expect("memory");
        assert_eq!(arena.remaining(), 256, "rounded up to lines");
        assert!(arena.take(257).is_none());
        let first = arena.take(130).expect("it fits");
        assert_eq!(arena.remaining(), 64);
        let last = arena.take(64).expect("it fits");
        assert_eq!((arena.remaining(), arena.take(1).is_none()), (0, true));
        assert_eq!(arena.take(0).expect("nothing always fits").len(), 0);
        drop(arena);
        assert_eq!((first[129], last[63]), (0, 0), "segments outlive their arena");
    }

    #[test]
    fn released_memory_goes_back_while_its_neighbours_live() {
        let mut arena = Arena::new(64 << 10, false).expect("memory");
        // Pieces that end in the middle of a page of the system, and a padded one.
        let sizes = [5000, 9000, 7000, 70, 3000, 20_000];
        let mut segments: Vec<Segment> = sizes.iter().map(|&s| arena.take(s).expect("it fits")).collect();
        segments.iter_mut().for_each(|s| s.fill(7));
        let (map, start) = (Arc::clone(&arena.mapping), arena.mapping.start);
        let last = segments.pop().expect("six");
        let first = segments.remove(0);
        let from = segments[0].start.as_ptr() as usize - start.as_ptr() as usize;
        let until = last.start.as_ptr() as usize - start.as_ptr() as usize;
        drop(arena);
        segments.reverse();
        Segment::release(segments);
        assert!(first.iter().chain(last.iter()).all(|&byte| byte == 7), "what lives is left alone");
        let page = if cfg!(unix) { rustix::param::page_size() } else { usize::MAX };
        // SAFETY: `map` keeps the memory alive, and nothing else can reach the segments that were dropped.
        let dead = unsafe { std::slice::from_raw_parts(start.as_ptr().add(from), until - from) };
        let skew = start.as_ptr() as usize - map._map.as_ptr() as usize;
        for (i, &byte) in dead.iter().enumerate() {
            let at = (skew + from + i) / page * page;
            let whole = at >= skew + from && at.saturating_add(page) <= skew + until;
            assert!(!whole || byte == 0, "byte {i} is {byte}");
        }
        assert!(page > 4096 || dead.contains(&0), "there were whole pages");
    }

    #[test]
    fn releasing_all_of_a_map_or_nothing_is_harmless() {
        Segment::release(Vec::new());
        let (mut a, mut b) = (Segment::new(10_000).expect("memory"), Segment::new(10_000).expect("memory"));
        (a[0], b[0]) = (1, 2);
        Segment::release(vec![b, a]);
    }

    #[test]
    fn too_much_is_an_error_with_the_number() {
        for bytes in [usize::MAX, usize::MAX / 2 - 100, 1 << 60] {
            let error = Segment::new(bytes).expect_err("no machine has it").to_string();
            assert!(error.contains("cannot map") && error.contains("bytes"), "{error}");
        }
    }

    #[test]
    fn a_segment_moves_between_threads_and_reads_as_numbers() {
        let mut segment = Segment::new(4 * 1000 + 3).expect("memory");
        let segment = std::thread::spawn(move || {
            segment.as_mut_slice_of::<f32>().fill(1.5);
            segment
        })
        .join()
        .expect("no panic");
        assert_eq!(segment.as_slice_of::<f32>(), [1.5f32; 1000]);
        assert_eq!(&segment[4000..], [0, 0, 0]);
    }
}

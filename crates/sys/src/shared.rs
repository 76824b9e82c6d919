//! The bridge that lets workers share buffers without `unsafe`: claims are checked at run time, for some nanoseconds.
//!
//! A buffer is cut into *stripes*, usually one a worker. In a phase each worker writes its own stripe, or all read; a
//! barrier lies between. If the phases are wrong (a reader while a stripe is written, two writers of one stripe) the
//! claim panics with the buffer's name and the stripe: a race becomes a message, never undefined behaviour.
//!
//! A claim is a few atomic operations: one on the buffer's line to read it whole, one on the stripe and one on the buffer
//! to write a stripe, one a touched stripe to read a range.

use crate::error::SysError;
use crate::team::share;
use std::alloc::{Layout, alloc, dealloc};
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A writer holds the stripe; below it, the number of range readers.
const WRITER: u32 = 1 << 31;
/// One write claim in [`Shared::whole`]; below it, the number of readers of the whole buffer.
const ONE_WRITE: u64 = 1 << 32;

/// Alignment of every buffer: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// The claims on one stripe, on a line of its own.
#[repr(align(64))]
struct Stripe(AtomicU32);

/// A buffer of fixed length, 64-byte aligned, that the workers of a team share by claims. Elements are plain copies.
pub struct Shared<T: Copy> {
    data: NonNull<T>,
    len: usize,
    /// Ascending, from 0 to `len`: stripe `s` holds `bounds[s]..bounds[s + 1]`.
    bounds: Box<[usize]>,
    stripes: Box<[Stripe]>,
    /// Write claims (upper half) and readers of the whole buffer (lower half).
    whole: Box<Whole>,
    name: Cow<'static, str>,
}

#[repr(align(64))]
struct Whole(AtomicU64);

// SAFETY: the buffer owns its elements; sending it sends them.
unsafe impl<T: Copy + Send> Send for Shared<T> {}
// SAFETY: access goes through claims that admit several readers or one writer an element, so sharing the buffer needs
// both: elements read from several threads (Sync) and written from another one (Send).
unsafe impl<T: Copy + Send + Sync> Sync for Shared<T> {}

impl<T: Copy> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.name)
            .field("len", &self.len)
            .field("stripes", &self.stripes())
            .finish()
    }
}

impl<T: Copy> Shared<T> {
    /// A buffer of `len` elements in one stripe.
    ///
    /// # Panics
    /// When the memory cannot be had; [`Shared::try_striped`] returns that as an error.
    pub fn new(len: usize, fill: T) -> Self {
        Self::striped(len, &[0, len], fill)
    }

    /// A buffer of `len` elements cut at `bounds`: `[0, end of stripe 0, …, len]`, ascending; stripes may be empty.
    ///
    /// # Panics
    /// When the bounds do not ascend from 0 to `len`, or the memory cannot be had; [`Shared::try_striped`] returns
    /// both as errors.
    pub fn striped(len: usize, bounds: &[usize], fill: T) -> Self {
        match Self::try_striped(len, bounds, fill) {
            Ok(shared) => shared,
            Err(error) => panic!("{error}"),
        }
    }

    /// A buffer of `units * unit` elements in `parts` stripes: the stripe of worker `i` of `parts` is `unit` times its
    /// [`Worker::range`](crate::Worker::range)`(units)`.
    ///
    /// # Panics
    /// When `parts` is 0, or the memory cannot be had.
    pub fn even(units: usize, unit: usize, parts: usize, fill: T) -> Self {
        let Some(len) = units.checked_mul(unit) else {
            panic!("{}", SysError::TooLarge { len: units, size: unit.saturating_mul(size_of::<T>()) })
        };
        assert!(parts > 0, "a shared buffer has at least 1 stripe");
        let bounds: Vec<usize> =
            std::iter::once(0).chain((0..parts).map(|part| share(units, part, parts).end * unit)).collect();
        Self::striped(len, &bounds, fill)
    }

    /// As [`Shared::striped`], with errors for what it panics on.
    ///
    /// # Errors
    /// [`SysError::Bounds`], [`SysError::TooLarge`], [`SysError::Memory`].
    pub fn try_striped(len: usize, bounds: &[usize], fill: T) -> Result<Self, SysError> {
        let ascends = bounds.windows(2).all(|pair| pair[0] <= pair[1]);
        if bounds.len() < 2 || bounds[0] != 0 || bounds[bounds.len() - 1] != len || !ascends {
            return Err(SysError::Bounds { bounds: bounds.to_vec(), len });
        }
        let layout = Self::layout(len).ok_or(SysError::TooLarge { len, size: size_of::<T>() })?;
        let data = if layout.size() == 0 {
            NonNull::dangling()
        } else {
            // SAFETY: the layout has a size.
            let raw = unsafe { alloc(layout) }.cast::<T>();
            NonNull::new(raw).ok_or_else(|| SysError::Memory {
                bytes: layout.size(),
                source: std::io::ErrorKind::OutOfMemory.into(),
            })?
        };
        for i in 0..len {
            // SAFETY: `i < len`, inside the allocation; T is Copy, so nothing is dropped by overwriting.
            unsafe { data.add(i).write(fill) };
        }
        Ok(Self {
            data,
            len,
            bounds: bounds.into(),
            stripes: (1..bounds.len()).map(|_| Stripe(AtomicU32::new(0))).collect(),
            whole: Box::new(Whole(AtomicU64::new(0))),
            name: Cow::Borrowed("unnamed"),
        })
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::array::<T>(len).ok()?.align_to(ALIGN).ok()
    }

    /// Gives the buffer the name that its conflict messages carry.
    #[must_use]
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// The name given by [`Shared::named`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of stripes, at least 1.
    #[inline]
    pub fn stripes(&self) -> usize {
        self.stripes.len()
    }

    /// The elements of a stripe.
    ///
    /// # Panics
    /// When there is no such stripe.
    pub fn stripe_range(&self, stripe: usize) -> Range<usize> {
        self.elements(stripe..stripe + 1)
    }

    /// The whole buffer, without a claim: the borrow is exclusive already.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the elements are initialised and `&mut self` excludes every guard.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    /// Claims the whole buffer for reading. Any number of readers may hold it together.
    ///
    /// # Panics
    /// When a stripe is being written.
    #[inline]
    pub fn read(&self) -> ReadGuard<'_, T> {
        let before = self.whole.0.fetch_add(1, Ordering::Acquire);
        if before >= ONE_WRITE {
            self.whole.0.fetch_sub(1, Ordering::Release);
            let held = self.stripes.iter().position(|s| s.0.load(Ordering::Relaxed) & WRITER != 0);
            self.conflict("read", held);
        }
        ReadGuard { shared: self, elements: 0..self.len, claim: None }
    }

    /// Claims the elements of `range` for reading; stripes that it does not touch may be written meanwhile.
    ///
    /// # Panics
    /// When a touched stripe is being written, or the range leaves the buffer.
    #[inline]
    pub fn read_range(&self, range: Range<usize>) -> ReadGuard<'_, T> {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} leaves buffer {:?} of {} elements",
            self.name,
            self.len
        );
        let touched = if range.is_empty() {
            0..0
        } else {
            // The last stripe that begins at or before the start; those before the first that begins at or after the end.
            let first = self.bounds.partition_point(|&bound| bound <= range.start) - 1;
            first..self.bounds.partition_point(|&bound| bound < range.end)
        };
        for stripe in touched.clone() {
            let before = self.stripes[stripe].0.fetch_add(1, Ordering::Acquire);
            if before & WRITER != 0 {
                self.release_readers(touched.start..stripe + 1);
                self.conflict("read", Some(stripe));
            }
        }
        ReadGuard { shared: self, elements: range, claim: Some(touched) }
    }

    /// Claims one stripe for reading.
    ///
    /// # Panics
    /// When it is being written, or there is no such stripe.
    #[inline]
    pub fn read_stripe(&self, stripe: usize) -> ReadGuard<'_, T> {
        self.read_range(self.stripe_range(stripe))
    }

    /// Claims one stripe for writing.
    ///
    /// # Panics
    /// When it is being written or read, the whole buffer is being read, or there is no such stripe.
    #[inline]
    pub fn write(&self, stripe: usize) -> WriteGuard<'_, T> {
        self.write_many(stripe..stripe + 1)
    }

    /// Claims neighbouring stripes for writing, as one slice.
    ///
    /// # Panics
    /// When one of them is being written or read, the whole buffer is being read, or there are no such stripes.
    #[inline]
    pub fn write_many(&self, stripes: Range<usize>) -> WriteGuard<'_, T> {
        let elements = self.elements(stripes.clone());
        for stripe in stripes.clone() {
            let state = &self.stripes[stripe].0;
            if state.compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed).is_err() {
                self.release_writers(stripes.start..stripe);
                self.conflict("write", Some(stripe));
            }
        }
        let before = self.whole.0.fetch_add(ONE_WRITE, Ordering::Acquire);
        if before & (ONE_WRITE - 1) != 0 {
            self.whole.0.fetch_sub(ONE_WRITE, Ordering::Release);
            self.release_writers(stripes.clone());
            self.conflict("write", Some(stripes.start));
        }
        WriteGuard { shared: self, elements, stripes, _exclusive: PhantomData }
    }

    /// Claims the whole buffer for writing.
    ///
    /// # Panics
    /// When any part of it is being written or read.
    #[inline]
    pub fn write_all(&self) -> WriteGuard<'_, T> {
        self.write_many(0..self.stripes())
    }

    fn elements(&self, stripes: Range<usize>) -> Range<usize> {
        assert!(
            stripes.start <= stripes.end && stripes.end <= self.stripes(),
            "buffer {:?} has no stripes {stripes:?}: it has {}",
            self.name,
            self.stripes()
        );
        self.bounds[stripes.start]..self.bounds[stripes.end]
    }

    fn release_readers(&self, stripes: Range<usize>) {
        for stripe in &self.stripes[stripes] {
            stripe.0.fetch_sub(1, Ordering::Release);
        }
    }

    fn release_writers(&self, stripes: Range<usize>) {
        for stripe in &self.stripes[stripes] {
            // Not a plain store: a reader that is about to give up may have counted itself in.
            stripe.0.fetch_and(!WRITER, Ordering::Release);
        }
    }

    #[cold]
    fn conflict(&self, claim: &str, stripe: Option<usize>) -> ! {
        let stripe = stripe.map_or("a stripe".to_owned(), |s| format!("stripe {s}"));
        panic!(
            "conflicting claim on buffer {:?}: {stripe} of {} is claimed to {claim} it while another worker holds it; \
             phases overlap, a barrier is missing or a guard lives too long",
            self.name,
            self.stripes()
        );
    }
}

impl<T: Copy> Drop for Shared<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len).filter(|layout| layout.size() > 0) {
            // SAFETY: `data` was allocated with this very layout, and no guard outlives the buffer.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) };
        }
    }
}

/// A claim to read; derefs to the elements. Dropping it ends the claim.
pub struct ReadGuard<'a, T: Copy> {
    shared: &'a Shared<T>,
    elements: Range<usize>,
    /// The stripes claimed one by one; `None` for the whole buffer.
    claim: Option<Range<usize>>,
}

impl<T: Copy> Deref for ReadGuard<'_, T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the elements lie inside the buffer and are initialised; while this claim stands every write claim on
        // them panics, so nobody changes them.
        unsafe {
            std::slice::from_raw_parts(
                self.shared.data.as_ptr().add(self.elements.start),
                self.elements.len(),
            )
        }
    }
}

impl<T: Copy> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        match self.claim.clone() {
            Some(stripes) => self.shared.release_readers(stripes),
            None => {
                self.shared.whole.0.fetch_sub(1, Ordering::Release);
            }
        }
    }
}

/// A claim to write; derefs to the elements. Dropping it ends the claim.
pub struct WriteGuard<'a, T: Copy> {
    shared: &'a Shared<T>,
    elements: Range<usize>,
    stripes: Range<usize>,
    /// A guard is shared between threads like the `&mut [T]` that it stands for.
    _exclusive: PhantomData<&'a mut [T]>,
}

impl<T: Copy> Deref for WriteGuard<'_, T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the elements lie inside the buffer and are initialised; while this claim stands every other claim on
        // them panics, and `&self` excludes `deref_mut`.
        unsafe {
            std::slice::from_raw_parts(
                self.shared.data.as_ptr().add(self.elements.start),
                self.elements.len(),
            )
        }
    }
}

impl<T: Copy> DerefMut for WriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.shared.data.as_ptr().add(self.elements.start),
                self.elements.len(),
            )
        }
    }
}

impl<T: Copy> Drop for WriteGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.shared.whole.0.fetch_sub(ONE_WRITE, Ordering::Release);
        self.shared.release_writers(self.stripes.clone());
    }
}

//! Where the heads of a layer meet.

use std::sync::{Arc, Mutex, MutexGuard};

/// Where the heads of a layer leave numbers for each other. What is left for one position is read at the next, so the
/// numbers of two positions are kept.
pub struct Board(Mutex<[Vec<Post>; 2]>);

#[derive(Clone, Default)]
struct Post {
    /// Which position the numbers are of, plus one; 0 before the first.
    when: usize,
    numbers: Arc<Vec<f32>>,
}

impl Board {
    pub(in crate::attention) fn new(heads: usize) -> Self {
        Board(Mutex::new([vec![Post::default(); heads], vec![Post::default(); heads]]))
    }

    fn lock(&self) -> MutexGuard<'_, [Vec<Post>; 2]> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(in crate::attention) fn copy(&self) -> Self {
        Board(Mutex::new(self.lock().clone()))
    }

    /// Leaves the numbers of `head` for `position`.
    pub(in crate::attention) fn put(&self, head: usize, position: usize, numbers: Vec<f32>) {
        self.lock()[position % 2][head] = Post { when: position + 1, numbers: Arc::new(numbers) };
    }

    /// Takes what `head` left for `position` off.
    pub(in crate::attention) fn take_off(&self, head: usize, position: usize) {
        self.lock()[position % 2][head] = Post::default();
    }

    /// The numbers of every head for `position`, if all have left them.
    pub(in crate::attention) fn all(&self, position: usize) -> Option<Vec<Arc<Vec<f32>>>> {
        let posts = &self.lock()[position % 2];
        let whole = posts.iter().all(|post| post.when == position + 1);
        whole.then(|| posts.iter().map(|post| Arc::clone(&post.numbers)).collect())
    }
}

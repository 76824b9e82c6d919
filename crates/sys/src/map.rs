//! A read-only file in memory, for weights and traces that are larger than one wants to copy.

use crate::error::SysError;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

/// A whole file, mapped read-only; derefs to its bytes. The map stays valid when the file is renamed or unlinked.
///
/// The file must not be truncated or rewritten in place while it is mapped: Longbit's own writers write beside and
/// rename, which leaves an open map on the old content.
#[derive(Debug)]
pub struct FileMap {
    map: memmap2::Mmap,
    path: PathBuf,
}

impl FileMap {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`SysError::File`] when it cannot be opened or mapped, [`SysError::NotMappable`] for a directory, another special
    /// file, or an empty file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SysError> {
        let path = path.as_ref();
        let fail = |action| move |source| SysError::File { action, path: path.to_owned(), source };
        let refuse = |what| SysError::NotMappable { path: path.to_owned(), what };
        // Asked before opening: to open a named pipe would wait for a writer.
        let found = std::fs::metadata(path).map_err(fail("open"))?;
        if found.is_dir() {
            return Err(refuse("a directory"));
        }
        if !found.is_file() {
            return Err(refuse("not a regular file"));
        }
        let file = File::open(path).map_err(fail("open"))?;
        let len = file.metadata().map_err(fail("read the size of"))?.len();
        if len == 0 {
            return Err(refuse("empty"));
        }
        // SAFETY: the map is private to this value and only read; the documented contract of `FileMap` is that nobody
        // truncates or rewrites the file in place while it is mapped.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail("map"))?;
        Ok(Self { map, path: path.to_owned() })
    }

    /// Gives the memory of the pages that lie wholly in `range` back to the system: they count no longer as resident, and
    /// are read from the file again when they are touched. Advice only; where there is none, nothing happens.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let page = rustix::param::page_size();
            let (start, end) =
                (range.start.next_multiple_of(page), range.end.min(self.map.len()) / page * page);
            if start < end {
                // SAFETY: the map is shared, read-only and backed by its file: dropping pages changes no byte that a
                // reader of `self` sees, only where it comes from.
                let _ = unsafe {
                    self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Maps the pages of `range` at once, reading what is not in the page cache: cheaper than a page fault for each few
    /// of them. Advice only.
    pub fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            let start = range.start / rustix::param::page_size() * rustix::param::page_size();
            let end = range.end.min(self.map.len());
            if start < end {
                // A system that does not know this advice maps pages when they are touched.
                let _ = self.map.advise_range(memmap2::Advice::PopulateRead, start, end - start);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Asks the system to drop the pages of the file at `path` from its cache, so that the next read comes from the disk.
/// Advice, for measurements: where there is none, nothing happens.
///
/// # Errors
/// When the file cannot be opened or written back.
pub fn drop_cached_pages(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    // Only clean pages are dropped.
    file.sync_all()?;
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test alone, removed when it ends.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("longbit-map-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("a temporary directory");
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_its_bytes_even_after_it_is_replaced() {
        let dir = Dir::new("bytes");
        let path = dir.0.join("weights.bin");
        std::fs::write(&path, b"ternary").expect("write");
        let map = FileMap::open(&path).expect("map");
        assert_eq!(&map[..], b"ternary");
        assert_eq!(map.path(), path);
        std::fs::write(dir.0.join("new"), b"other").expect("write");
        std::fs::rename(dir.0.join("new"), &path).expect("rename");
        assert_eq!(&map[..], b"ternary");
    }

    #[test]
    fn what_cannot_be_mapped_is_said() {
        let dir = Dir::new("errors");
        let missing = FileMap::open(dir.0.join("none")).expect_err("missing").to_string();
        assert!(missing.contains("cannot open") && missing.contains("none"), "{missing}");
        let directory = FileMap::open(&dir.0).expect_err("directory").to_string();
        assert!(directory.contains("a directory"), "{directory}");
        std::fs::write(dir.0.join("empty"), b"").expect("write");
        let empty = FileMap::open(dir.0.join("empty")).expect_err("empty").to_string();
        assert!(empty.contains("empty"), "{empty}");
    }
}

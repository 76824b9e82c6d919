//! Brings the files of a checkpoint into the page cache while they are being repacked. Page faults alone would read a few
//! pages at a time, with every thread waiting for its own; one plain reader keeps a disk busy.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

use longbit_sys::FileMap;

/// Bytes read at a time, and dropped: they stay in the page cache.
const PIECE: usize = 1 << 20;

/// Runs `work` while `files` are read, in their order.
pub(super) fn while_reading_ahead<R>(files: &[FileMap], work: impl FnOnce() -> R) -> R {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The thread waits for the disk nearly all of its time; it takes no core from the team.
        scope.spawn(|| {
            let mut piece = vec![0; PIECE];
            for file in files {
                // A file that cannot be read here is read through its map, which will say what is wrong.
                let Ok(mut file) = File::open(file.path()) else { continue };
                while file.read(&mut piece).is_ok_and(|n| n > 0) {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    })
}

//! Small files, read whole.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Reads the regular file at `path`, of at most `most` bytes. No more is read than that, whatever length the file claims
/// to have, and nothing that would wait or never end is opened.
///
/// # Errors
/// [`Error::Read`] from the system; [`Error::Config`] for what is no regular file, or longer.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let fail = |source| Error::Read { path: path.into(), source };
    let refuse = |reason| Error::Config { path: path.into(), reason };
    // Asked before opening: to open a named pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(refuse("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(fail)?.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > most {
        return Err(refuse(format!("has more than {most} bytes, the most that is read")));
    }
    Ok(bytes)
}

/// As [`read`], for a text.
///
/// # Errors
/// As [`read`], and [`Error::Config`] for bytes that are not UTF-8.
pub(crate) fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|e| Error::Config { path: path.into(), reason: format!("is not UTF-8: {e}") })
}

/// A file that may be absent.
///
/// # Errors
/// As the reading that `result` comes from, for all else.
pub(crate) fn if_there<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_length_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("text"), "four").unwrap();
        assert_eq!(read_text(&at("text"), 4).unwrap(), "four");
        let message = read(&at("text"), 3).unwrap_err().to_string();
        assert!(message.contains("text") && message.contains("more than 3 bytes"), "{message}");
        std::fs::write(at("bytes"), [0xFF, 0xFE]).unwrap();
        assert!(read_text(&at("bytes"), 9).unwrap_err().to_string().contains("not UTF-8"));
        // A pipe would wait for a writer, and a device never ends.
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        std::os::unix::fs::symlink("/dev/zero", at("device")).unwrap();
        std::os::unix::fs::symlink(at("text"), at("link")).unwrap();
        for name in ["pipe", "device", "."] {
            let message = read(&at(name), 9).unwrap_err().to_string();
            assert!(message.contains("not a regular file"), "{name}: {message}");
        }
        assert_eq!(read(&at("link"), 9).unwrap(), b"four");
        assert!(if_there(read(&at("absent"), 9)).unwrap().is_none());
        assert!(if_there(read(&at("pipe"), 9)).is_err());
    }
}

//! A file that is there when it is whole, and not before.
//!
//! It has no name while it is written, so that nothing is left behind whatever happens, SIGKILL
//! included; where the file system has no nameless files it has another name meanwhile, which goes
//! with [`NewFile`]. In either case a file that exists by then is never replaced.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::config::{BuildError, Invalid};

/// See the module.
pub struct NewFile {
    file: File,
    path: PathBuf,
    /// Its name until then, where it needs one.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Begins a file that is to be at `path`.
    pub fn begin(path: &Path) -> Result<Self, BuildError> {
        Self::begin_as(path, true)
    }

    /// The same for a thread that may not make files with names.
    pub fn begin_nameless(path: &Path) -> Result<Self, BuildError> {
        Self::begin_as(path, false)
    }

    fn begin_as(path: &Path, may_have_name: bool) -> Result<Self, BuildError> {
        if path.file_name().is_none() || path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(invalid(format!(
                "{} is not the name of a file",
                path.display()
            )));
        }
        match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => return Err(exists(path)),
            // Would be found out when it gets its name, at the end.
            Err(error @ (Errno::NAMETOOLONG | Errno::INVAL)) => return Err(cannot(path, error)),
            Err(_) => {}
        }
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let nameless = rustix::fs::openat(CWD, folder(path), flags | OFlags::TMPFILE, mode);
        let (fd, temporary) = match nameless {
            Ok(fd) => (fd, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) if may_have_name => {
                let mut name = path.as_os_str().to_owned();
                name.push(format!(".{}.part", std::process::id()));
                let temporary = PathBuf::from(name);
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                let fd = rustix::fs::openat(CWD, &temporary, flags, mode);
                (fd.map_err(|e| cannot(path, e))?, Some(temporary))
            }
            Err(error) => return Err(cannot(path, error)),
        };
        Ok(Self {
            file: fd.into(),
            path: path.into(),
            temporary,
        })
    }

    /// To write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A name for it as long as this lives, by which this process can open it.
    pub fn own_name(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// As [`NewFile::finish`], but it is an error where the name is not sure to survive a power cut,
    /// and until [`Named::keep`] the name is taken away again.
    pub fn finish_durably(self) -> Result<Named, BuildError> {
        let path = self.path.clone();
        let failed =
            |error: Errno| BuildError::host(format!("finishing {}", path.display()), error);
        let stat = rustix::fs::fstat(&self.file).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, folder(&path), flags, Mode::empty());
        let folder = folder.map_err(|e| cannot(&path, e))?;
        self.finish()?;
        let named = Named {
            path: path.clone(),
            identity: (stat.st_dev, stat.st_ino),
            kept: false,
        };
        match rustix::fs::fsync(&folder) {
            // A file system that can't sync a folder has kept the name already.
            Ok(()) | Err(Errno::INVAL) => Ok(named),
            Err(error) => Err(failed(error)),
        }
    }

    /// Makes it durable and gives it its name.
    pub fn finish(mut self) -> Result<(), BuildError> {
        let failed =
            |error: Errno| BuildError::host(format!("finishing {}", self.path.display()), error);
        rustix::fs::fsync(&self.file).map_err(failed)?;
        // Before it has its name, as an error shall leave nothing behind.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match rustix::fs::openat(CWD, folder(&self.path), flags, Mode::empty()) {
            Ok(folder) => Some(folder),
            // One may make files in it and not read it.
            Err(Errno::ACCESS) => None,
            Err(error) => return Err(failed(error)),
        };
        let named = match &self.temporary {
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, own, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)
            }
            Some(name) => {
                rustix::fs::renameat_with(CWD, name, CWD, &self.path, RenameFlags::NOREPLACE)
            }
        };
        match named {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(exists(&self.path)),
            Err(error) => return Err(failed(error)),
        }
        self.temporary = None;
        match folder.map_or(Ok(()), rustix::fs::fsync) {
            // A file system that can't sync a folder has kept the name already.
            Ok(()) | Err(Errno::INVAL) => {}
            // It is whole and in its place, and others may use it by now.
            Err(error) => tracing::warn!(
                path = %self.path.display(),
                %error,
                "the folder of a new file can't be synced: its name may not outlast a power failure"
            ),
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // Best effort: there is nobody to tell.
            let _ = rustix::fs::unlink(name);
        }
    }
}

/// A file that has just got its name, and loses it again unless it is kept.
pub struct Named {
    path: PathBuf,
    identity: (u64, u64),
    kept: bool,
}

impl Named {
    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let found = rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW);
        if found.is_ok_and(|found| (found.st_dev, found.st_ino) == self.identity)
            && let Err(error) = rustix::fs::unlinkat(CWD, &self.path, AtFlags::empty())
        {
            tracing::warn!(path = %self.path.display(), %error, "a new file is left behind");
        }
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn exists(path: &Path) -> BuildError {
    invalid(format!("{} exists already", path.display()))
}

/// The path's fault, unless the host or the process has run out of something.
fn cannot(path: &Path, error: Errno) -> BuildError {
    match BuildError::cannot_open("path", path, error) {
        BuildError::Invalid(_) => invalid(format!(
            "{} can't be made: {}",
            path.display(),
            std::io::Error::from(error)
        )),
        host => host,
    }
}

fn invalid(reason: String) -> BuildError {
    Invalid::new("path", reason).into()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_there_when_it_is_finished_and_never_replaces_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        drop(NewFile::begin(&path).unwrap());
        assert_eq!(names(), 0);
        let new = NewFile::begin(&path).unwrap();
        let late = NewFile::begin(&path).unwrap();
        new.file().write_all(b"whole").unwrap();
        assert!(!path.exists());
        new.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert!(late.finish().unwrap_err().to_string().contains("exists"));
        assert!(NewFile::begin(&path).is_err());
        let name = "n".repeat(300);
        for wrong in ["..", "other/", "nul\0", &name] {
            let refused = NewFile::begin(&folder.path().join(wrong)).err();
            assert!(matches!(refused, Some(BuildError::Invalid(_))), "{wrong}");
        }
        assert!(NewFile::begin(&folder.path().join("no/such")).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(), 1);
    }

    #[test]
    fn only_what_the_path_is_to_blame_for_names_it() {
        for error in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            let error = cannot(Path::new("/x"), error);
            assert!(matches!(error, BuildError::Host { .. }), "{error}");
        }
        let error = cannot(Path::new("/x"), Errno::ROFS);
        assert!(
            matches!(&error, BuildError::Invalid(wrong) if wrong.field == "path"),
            "{error}"
        );
    }

    #[test]
    fn a_name_that_is_not_kept_goes_again_unless_another_file_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let finished = || NewFile::begin(&path).unwrap().finish_durably().unwrap();
        let named = finished();
        assert!(path.exists());
        drop(named);
        assert!(!path.exists());
        let named = finished();
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        std::fs::write(&path, "another").unwrap();
        drop(named);
        assert_eq!(std::fs::read(&path).unwrap(), b"another");
        assert!(folder.path().join("moved").exists());
        std::fs::remove_file(&path).unwrap();
        finished().keep();
        assert!(path.exists());
    }

    #[test]
    fn a_file_without_its_folder_is_not_finished() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        let new = NewFile::begin(&folder.join("new")).unwrap();
        std::fs::remove_dir(&folder).unwrap();
        assert!(new.finish().is_err());
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_that_is_needed_meanwhile_goes_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let temporary = folder.path().join("new.part");
        let new = |temporary: &PathBuf| NewFile {
            file: File::create(temporary).unwrap(),
            path: path.clone(),
            temporary: Some(temporary.clone()),
        };
        drop(new(&temporary));
        assert!(!temporary.exists());
        new(&temporary).finish().unwrap();
        assert!(path.exists() && !temporary.exists());
        assert!(new(&temporary).finish().is_err());
        assert!(!temporary.exists());
    }
}

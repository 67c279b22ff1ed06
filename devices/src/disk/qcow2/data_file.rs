//! External data files (QEMU's `docs/interop/qcow2.txt`, "External data file"): the image has the
//! tables, and another file has what they lead to.
//!
//! Data is in that file where it is on the disk, at the same offset, as QEMU has it too; entries that
//! say otherwise are corrupt. The image counts no references to it, nothing in it is compressed, and
//! there are no internal snapshots. An L2 entry has the COPIED bit, which tells a cluster at offset 0
//! from one that there is not. With `data_file_raw` the file is, as a raw image, the disk.
//!
//! The name in the header is followed, relative to the folder of the image, only by consent, as that
//! of a backing file: it may name a file of the host that was never meant to be a disk
//! (CVE-2024-32498). The file is locked as the image is, and written to with
//! it (`write/external`).

use std::path::{Path, PathBuf};

use super::super::OpenOptions;
use super::super::open::HostFile;
use super::chain::{Opening, beside, failed, open_file_as, refused};
use super::header::ExternalData;
use crate::config::{BuildError, Invalid};

/// What the file systems are called (`statfs`) whose files are none, but ways to talk to the kernel:
/// what a guest writes to `/proc/self/mem` would be our memory.
const NO_DISKS: [u32; 14] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0xcafe_4a11, // bpf
    0xde5e_81e4, // efivarfs
    0x6165_676c, // pstore
    0xf97c_ff8c, // selinuxfs
    0x4249_4e4d, // binfmt_misc
    0x6e73_6673, // nsfs
];

/// Where the data file is that the header of `image` names, without consent to use it.
pub fn place(data: &ExternalData, image: &Path) -> Result<PathBuf, BuildError> {
    beside(image, &data.name).ok_or_else(|| {
        let name = data.name.escape_ascii();
        let reason = format!("the name of its data file, `{name}`, is not that of a file");
        refused(image, reason)
    })
}

/// The same, if `options` allow to follow it.
pub fn path(
    data: &ExternalData,
    image: &Path,
    options: &OpenOptions,
) -> Result<PathBuf, BuildError> {
    if !options.backing_files {
        let (image, name) = (image.display(), data.name.escape_ascii());
        let reason = format!("must be true for {image}, whose data is in the file `{name}`");
        return Err(Invalid::new("backing_files", reason).into());
    }
    place(data, image)
}

/// Opens and locks a data file as its image is opened; it is none of the files that were `seen`.
pub fn open(
    options: &OpenOptions,
    path: &Path,
    how: Opening,
    seen: &[(u64, u64)],
) -> Result<HostFile, BuildError> {
    let check = |identity| match seen.contains(&identity) {
        true => Err(refused(
            path,
            "is named as a data file, and is in use already, as an image or the data file of one",
        )),
        false => Ok(()),
    };
    // Before it is locked: the lock would be our own.
    if let Ok(stat) = rustix::fs::stat(path) {
        check((stat.st_dev, stat.st_ino))?;
    }
    match open_file_as(options, path, how) {
        Ok(host) if host.block_device => Err(refused(path, "a data file must be a regular file")),
        Ok(host) => {
            check(host.identity)?;
            let system = rustix::fs::fstatfs(&host.file).map_err(|e| failed(path, e.into()))?;
            match NO_DISKS.contains(&(system.f_type as u32)) {
                true => Err(refused(
                    path,
                    "a data file can't be one of the kernel's own",
                )),
                false => Ok(host),
            }
        }
        Err(BuildError::Invalid(wrong)) => {
            let reason = format!("data file {}: {}", path.display(), wrong.reason);
            Err(Invalid::new(wrong.field, reason).into())
        }
        other => other,
    }
}

//! A thin disk that its last writer left dirty, in the real process and its filters.

use serde_json::json;

use crate::support::ballast::Ballast;

#[test]
fn a_thin_disk_whose_refcounts_are_missing_is_mended_when_it_is_added_and_dirty() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let word = |bytes: &[u8], at: usize| {
        let bytes = bytes[at..at + 8].try_into().unwrap();
        u64::from_be_bytes(bytes) as usize
    };
    // Once they are set right in place, and once written anew.
    for (name, rebuilt) in [("a.qcow2", false), ("b.qcow2", true)] {
        let path = ballast.path(name);
        let thin = json!({"path": path, "image_type": "Qcow2", "size": 1 << 30});
        client.put_json("vm.create-disk", &thin);
        let mut bytes = std::fs::read(&path).unwrap();
        let table = word(&bytes, 48);
        let lost = if rebuilt { table } else { word(&bytes, table) };
        bytes[lost..lost + 8].fill(0);
        bytes[79] |= 1;
        std::fs::write(&path, &bytes).unwrap();
        let disk = json!({"path": path, "image_type": "Qcow2", "id": name});
        client.put_json("vm.add-disk", &disk);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[79], 0, "{name} is dirty");
        let block = word(&bytes, word(&bytes, 48));
        assert_eq!(bytes[block..block + 2], [0, 1], "{name}");
        assert_eq!(word(&bytes, 48) != table, rebuilt, "{name}");
    }
}

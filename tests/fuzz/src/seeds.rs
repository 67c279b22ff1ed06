//! Inputs to start from, made by code. libFuzzer runs a target's initialisation before it reads
//! the corpus, so that is where they are put.

use std::path::Path;

/// Puts inputs into the folder that libFuzzer takes its corpus from, if it was given one.
pub fn plant<'a>(seeds: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
    let folder = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let Some(folder) = folder.filter(|folder| Path::new(folder).is_dir()) else {
        return;
    };
    for (name, bytes) in seeds {
        let file = Path::new(&folder).join(format!("seed-{name}"));
        std::fs::write(file, bytes).expect("write a seed");
    }
}

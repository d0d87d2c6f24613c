//! Debian's kernels as `make setup-lab` unpacks them, and their modules in the order in which they
//! can be loaded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::LabError;

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    /// The compressed image.
    pub image: PathBuf,
    /// Every module by its name, with underscores.
    modules: BTreeMap<String, PathBuf>,
    built_in: String,
    root: PathBuf,
}

/// A kernel and the kernel's own modules disagree about `-` and `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

impl Kernel {
    /// Opens the package unpacked in `root`.
    pub fn open(root: &Path) -> Result<Kernel, LabError> {
        let missing = || LabError::Missing(root.display().to_string());
        let versions = fs::read_dir(root.join("lib/modules")).map_err(|_| missing())?;
        let version = versions.flatten().next().ok_or_else(missing)?.file_name().to_string_lossy().into_owned();
        let modules_dir = root.join("lib/modules").join(&version);
        let mut modules = BTreeMap::new();
        find_modules(&modules_dir.join("kernel"), &mut modules)
            .map_err(LabError::io(format!("list the modules in {}", root.display())))?;
        let built_in = fs::read_to_string(modules_dir.join("modules.builtin")).unwrap_or_default();
        let image = root.join("boot").join(format!("vmlinuz-{version}"));
        Ok(Kernel { image, modules, built_in, root: root.to_owned() })
    }

    fn is_built_in(&self, name: &str) -> bool {
        self.built_in.lines().any(|line| {
            let file = line.rsplit('/').next().unwrap_or_default();
            file.strip_suffix(".ko").is_some_and(|stem| normal(stem) == name)
        })
    }

    /// The files of `wanted` and of all that they need, each after what it needs. What is built in
    /// is left out.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>, LabError> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&normal(name), &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<PathBuf>, depth: usize) -> Result<(), LabError> {
        const DEPTH_MAX: usize = 30;
        let wrong = |what: String| LabError::Kernel { kernel: self.root.display().to_string(), what };
        if self.is_built_in(name) {
            return Ok(());
        }
        let path = self.modules.get(name).ok_or_else(|| wrong(format!("it has no module {name}")))?;
        if order.contains(path) {
            return Ok(());
        }
        if depth > DEPTH_MAX {
            return Err(wrong(format!("the modules that {name} needs go round in a circle")));
        }
        let bytes = fs::read(path).map_err(LabError::io(format!("read {}", path.display())))?;
        for needed in dependencies(&bytes) {
            self.visit(&normal(&needed), order, depth + 1)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

fn find_modules(directory: &Path, found: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find_modules(&path, found)?;
        } else if let Some(stem) = entry.file_name().to_string_lossy().strip_suffix(".ko") {
            found.insert(normal(stem), path);
        }
    }
    Ok(())
}

/// The modules that a module says it needs: a text in the file between two zero bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = module.get(at + KEY.len()..).unwrap_or_default();
    let text = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(root: &Path) -> Kernel {
        let directory = root.join("lib/modules/6.1/kernel/net");
        fs::create_dir_all(&directory).unwrap();
        fs::write(root.join("lib/modules/6.1/modules.builtin"), "kernel/fs/there-already.ko\n").unwrap();
        for (name, needs) in [("top", "mid-dle,there_already"), ("mid-dle", "low"), ("low", ""), ("round", "round")] {
            fs::write(directory.join(format!("{name}.ko")), format!("x\0depends={needs}\0name=y\0")).unwrap();
        }
        Kernel::open(root).unwrap()
    }

    #[test]
    fn what_is_needed_is_loaded_first() {
        let root = tempfile::tempdir().unwrap();
        let order = kernel(root.path()).load_order(&["top", "low"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.file_stem().unwrap().to_string_lossy()).collect();
        assert_eq!(names, ["low", "mid-dle", "top"]);
    }

    #[test]
    fn unknown_and_circular_modules_are_errors() {
        let root = tempfile::tempdir().unwrap();
        let kernel = kernel(root.path());
        assert_eq!(kernel.load_order(&["there-already"]).unwrap(), Vec::<PathBuf>::new());
        assert!(kernel.load_order(&["nowhere"]).unwrap_err().to_string().contains("no module nowhere"));
        assert!(kernel.load_order(&["round"]).unwrap_err().to_string().contains("circle"));
        assert!(matches!(Kernel::open(&root.path().join("none")), Err(LabError::Missing(_))));
    }
}

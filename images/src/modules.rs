//! Which kernel modules go into the initramfs: those a recipe names, and everything they need.
//!
//! Works on the text files that depmod writes (modules.dep(5), modules.alias, modules.softdep, modules.builtin), and
//! cuts them to what is chosen, in their own order. `-` and `_` are the same in a module's name. Weak dependencies are
//! not followed: they are hints for loaders that have every module at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// depmod's files, as text.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// modules.dep
    pub dep: String,
    /// modules.alias
    pub alias: String,
    /// modules.softdep
    pub softdep: String,
    /// modules.builtin
    pub builtin: String,
}

/// The modules chosen, and depmod's files cut to them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Closure {
    /// Module files, relative to the modules directory (`kernel/fs/erofs/erofs.ko.xz`), sorted.
    pub files: Vec<String>,
    /// modules.dep
    pub dep: String,
    /// modules.alias
    pub alias: String,
    /// modules.softdep
    pub softdep: String,
    /// modules.builtin
    pub builtin: String,
}

/// Why modules cannot be gathered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The recipe names a module this kernel does not have.
    #[error("kernel {kernel} has no module {name}, neither as a file nor built in{hint}")]
    Unknown {
        /// The kernel's package.
        kernel: String,
        /// The name.
        name: String,
        /// A similar name, if there is one.
        hint: String,
    },
    /// depmod's file names a dependency that it does not list.
    #[error("modules.dep says {module} needs {needs}, and lists no such module")]
    Broken {
        /// Which module.
        module: String,
        /// What it needs.
        needs: String,
    },
}

/// `kernel/drivers/md/dm-verity.ko.xz` → `dm_verity`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split_once(".ko").map_or(file, |(name, _)| name))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// One line of modules.softdep: what is to be loaded before and after the module.
fn soft_names(line: &str) -> Option<(String, Vec<String>)> {
    let mut words = line.strip_prefix("softdep ")?.split_whitespace();
    let module = normal(words.next()?);
    let needs = words.filter(|word| !matches!(*word, "pre:" | "post:")).map(normal).collect();
    Some((module, needs))
}

/// One line of modules.alias: the alias and the module.
fn alias_pair(line: &str) -> Option<(String, String)> {
    let (alias, module) = line.strip_prefix("alias ")?.rsplit_once(' ')?;
    Some((normal(alias.trim()), normal(module)))
}

/// Finds the modules `wanted` and all they need. `kernel` is only for messages.
pub fn closure(index: &Index, wanted: &[String], kernel: &str) -> Result<Closure, ModuleError> {
    let lines = || index.dep.lines().filter_map(|line| line.split_once(':'));
    let by_name: BTreeMap<String, &str> = lines().map(|(path, _)| (module_name(path), path)).collect();
    let needs: BTreeMap<&str, &str> = lines().collect();
    let builtin: BTreeSet<String> = index.builtin.lines().map(module_name).collect();
    let mut soft: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (module, names) in index.softdep.lines().filter_map(soft_names) {
        soft.entry(module).or_default().extend(names);
    }
    let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (alias, module) in index.alias.lines().filter_map(alias_pair) {
        aliases.entry(alias).or_default().push(module);
    }

    let mut open: Vec<&str> = Vec::new();
    for name in wanted {
        let name = normal(name);
        if let Some(path) = by_name.get(&name) {
            open.push(path);
        } else if !builtin.contains(&name) {
            let hint = by_name.keys().chain(&builtin).find(|known| known.contains(&name) || name.contains(*known));
            let hint = hint.map_or(String::new(), |known| format!("; is {known} meant?"));
            return Err(ModuleError::Unknown { kernel: kernel.into(), name, hint });
        }
    }
    let mut chosen: BTreeSet<&str> = BTreeSet::new();
    while let Some(path) = open.pop() {
        if !chosen.insert(path) {
            continue;
        }
        for need in needs.get(path).map_or("", |needs| *needs).split_whitespace() {
            let broken = || ModuleError::Broken { module: path.into(), needs: need.into() };
            open.push(needs.get_key_value(need).map(|(path, _)| *path).ok_or_else(broken)?);
        }
        // A soft dependency may be a module, an alias (`crypto-sha256`), built in, or not there at all.
        for name in soft.get(&module_name(path)).into_iter().flatten() {
            let behind = aliases.get(name).into_iter().flatten();
            open.extend(std::iter::once(name).chain(behind).filter_map(|name| by_name.get(name)));
        }
    }

    let names: BTreeSet<String> = chosen.iter().map(|path| module_name(path)).collect();
    let keep = |text: &str, module: fn(&str) -> Option<String>| {
        text.lines().filter(|line| module(line).is_some_and(|name| names.contains(&name))).fold(
            String::new(),
            |mut kept, line| {
                writeln!(kept, "{line}").expect("a String takes every write");
                kept
            },
        )
    };
    Ok(Closure {
        files: chosen.iter().map(|path| (*path).to_owned()).collect(),
        dep: keep(&index.dep, |line| line.split_once(':').map(|(path, _)| module_name(path))),
        alias: keep(&index.alias, |line| alias_pair(line).map(|(_, module)| module)),
        softdep: keep(&index.softdep, |line| soft_names(line).map(|(module, _)| module)),
        builtin: index.builtin.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> Index {
        Index {
            dep: "kernel/a-x.ko.xz: kernel/b.ko.xz kernel/c.ko.xz\nkernel/b.ko.xz: kernel/c.ko.xz\nkernel/c.ko.xz:\n\
                  kernel/soft.ko.xz: kernel/c.ko.xz\nkernel/fast.ko.xz:\nkernel/other.ko.xz:\n"
                .into(),
            alias: "# Aliases\nalias pci:v1d*sv* a_x\nalias crypto-sum fast\nalias pci:v2* other\n".into(),
            softdep:
                "# Soft dependencies\nsoftdep b pre: crypto-sum absent\nsoftdep b post: soft\nsoftdep other pre: b\n"
                    .into(),
            builtin: "kernel/drivers/virtio/virtio-pci.ko\n".into(),
        }
    }

    fn choose(names: &[&str]) -> Result<Closure, ModuleError> {
        closure(&index(), &names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), "test-kernel")
    }

    #[test]
    fn hard_and_soft_dependencies_come_along_and_the_files_are_cut() {
        let closure = choose(&["a_x", "virtio_pci"]).unwrap();
        assert_eq!(
            closure.files,
            ["kernel/a-x.ko.xz", "kernel/b.ko.xz", "kernel/c.ko.xz", "kernel/fast.ko.xz", "kernel/soft.ko.xz"]
        );
        assert!(!closure.dep.contains("other"));
        assert_eq!(closure.alias, "alias pci:v1d*sv* a_x\nalias crypto-sum fast\n");
        assert_eq!(closure.softdep, "softdep b pre: crypto-sum absent\nsoftdep b post: soft\n");
        assert_eq!(closure.builtin, index().builtin);
    }

    #[test]
    fn unknown_names_are_refused_with_a_hint() {
        let error = choose(&["othe"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel test-kernel has no module othe, neither as a file nor built in; is other meant?"
        );
    }

    #[test]
    fn a_dependency_that_is_not_listed_is_an_error() {
        let index = Index { dep: "kernel/a.ko: kernel/gone.ko\n".into(), ..Index::default() };
        let error = closure(&index, &["a".into()], "k").unwrap_err();
        assert_eq!(error, ModuleError::Broken { module: "kernel/a.ko".into(), needs: "kernel/gone.ko".into() });
    }

    proptest! {
        /// For any graph, rings included: every chosen module's dependencies are chosen, and nothing else is.
        #[test]
        fn the_closure_is_closed_and_minimal(edges in prop::collection::vec((0_u8..12, 0_u8..12), 0..30), start in 0_u8..12) {
            let path = |id: u8| format!("kernel/m{id}.ko.xz");
            let mut dep = String::new();
            for id in 0..12 {
                let needs: Vec<_> = edges.iter().filter(|edge| edge.0 == id).map(|edge| path(edge.1)).collect();
                writeln!(dep, "{}: {}", path(id), needs.join(" ")).unwrap();
            }
            let chosen = closure(&Index { dep, ..Index::default() }, &[format!("m{start}")], "k").unwrap();
            // The same by brute force: grow the set until it no longer grows.
            let mut reached = BTreeSet::from([start]);
            for _ in 0..12 {
                let more: Vec<_> = edges.iter().filter(|edge| reached.contains(&edge.0)).map(|edge| edge.1).collect();
                reached.extend(more);
            }
            let mut expected: Vec<_> = reached.into_iter().map(path).collect();
            expected.sort();
            prop_assert_eq!(chosen.files, expected);
        }
    }
}

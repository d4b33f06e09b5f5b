//! Which kernel modules the hardware asks for: modalias matching and load order (modules.dep(5), and the formats of
//! modules.alias and modules.softdep as kmod reads them). Pure; loading is in `coldplug`.

use std::collections::{BTreeMap, HashSet};

/// The module index of one kernel, cut by the builder to what the initramfs holds.
#[derive(Debug, Default)]
pub struct ModuleIndex {
    /// Module name to (path below the modules directory, names it needs, in modules.dep's order).
    dep: BTreeMap<String, (String, Vec<String>)>,
    /// (glob, module name).
    alias: Vec<(String, String)>,
    /// Module name to modules loaded before it.
    before: BTreeMap<String, Vec<String>>,
    /// Module name to modules loaded after it.
    after: BTreeMap<String, Vec<String>>,
}

/// The name of the module in `path`: its base name, `-` as `_`, up to the first dot.
fn name_of(path: &str) -> String {
    let base = path.rsplit('/').next().unwrap_or(path);
    canonical(base.split('.').next().unwrap_or(base))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// A glob as kmod compares it: `-` is `_`, but for what stands between brackets, where it is a range.
fn canonical_glob(glob: &str) -> String {
    let mut within = false;
    let each = |c| {
        within = c == '[' || within && c != ']';
        if c == '-' && !within { '_' } else { c }
    };
    glob.chars().map(each).collect()
}

impl ModuleIndex {
    /// Reads the texts of modules.dep, modules.alias and modules.softdep; lines of other forms are passed over.
    pub fn parse(dep: &str, alias: &str, softdep: &str) -> Self {
        let mut index = Self::default();
        for line in dep.lines() {
            if let Some((path, needs)) = line.split_once(':') {
                let needs = needs.split_whitespace().map(name_of).collect();
                index.dep.insert(name_of(path), (path.trim().to_owned(), needs));
            }
        }
        for line in alias.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(glob), Some(module)) = (words.next(), words.next(), words.next()) {
                index.alias.push((canonical_glob(glob), canonical(module)));
            }
        }
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else { continue };
            let mut list = None;
            for word in words {
                match (word, list) {
                    ("pre:", _) => list = Some(true),
                    ("post:", _) => list = Some(false),
                    (name, Some(before)) => {
                        let lists = if before { &mut index.before } else { &mut index.after };
                        lists.entry(canonical(module)).or_default().push(canonical(name));
                    }
                    (_, None) => {}
                }
            }
        }
        index
    }

    /// Names of modules whose alias matches `modalias`.
    pub fn matching(&self, modalias: &str) -> impl Iterator<Item = &str> {
        let modalias = canonical(modalias);
        self.alias.iter().filter(move |(glob, _)| glob_match(glob, &modalias)).map(|(_, module)| module.as_str())
    }

    /// Whether it is the driver of a network card, by its place in the kernel's tree.
    pub fn is_network(&self, module: &str) -> bool {
        self.dep.get(module).is_some_and(|(path, _)| path.contains("/drivers/net/"))
    }

    /// Paths to load for `module`, dependencies first and what is to follow it last, without those in `loaded`. A
    /// module that is not in the index is built in or left out of the image: nothing to load.
    pub fn load_order(&self, module: &str, loaded: &HashSet<String>) -> Vec<(String, String)> {
        let mut order = Vec::new();
        let mut seen = loaded.clone();
        self.visit(&canonical(module), &mut seen, &mut order);
        order
    }

    fn visit(&self, module: &str, seen: &mut HashSet<String>, order: &mut Vec<(String, String)>) {
        let Some((path, needs)) = self.dep.get(module) else { return };
        if !seen.insert(module.to_owned()) {
            return;
        }
        self.visit_soft(&self.before, module, seen, order);
        // modules.dep lists the nearest dependency first: the farthest must be loaded first.
        for need in needs.iter().rev() {
            self.visit(need, seen, order);
        }
        order.push((module.to_owned(), path.clone()));
        self.visit_soft(&self.after, module, seen, order);
    }

    fn visit_soft(
        &self,
        lists: &BTreeMap<String, Vec<String>>,
        module: &str,
        seen: &mut HashSet<String>,
        order: &mut Vec<(String, String)>,
    ) {
        for soft in lists.get(module).into_iter().flatten() {
            if self.dep.contains_key(soft) {
                self.visit(soft, seen, order);
            } else {
                // Or an alias that several modules serve (`crc32c`): the kernel takes whichever of them works here.
                for behind in self.matching(soft).map(str::to_owned).collect::<Vec<_>>() {
                    self.visit(&behind, seen, order);
                }
            }
        }
    }
}

/// fnmatch(3) without flags, as modules.alias uses it: `*`, `?` and `[...]`.
fn glob_match(glob: &str, text: &str) -> bool {
    let (g, t) = (glob.as_bytes(), text.as_bytes());
    let (mut gi, mut ti) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while ti < t.len() {
        let step = match g.get(gi) {
            Some(b'*') => {
                star = Some((gi, ti));
                gi += 1;
                continue;
            }
            Some(b'?') => Some(gi + 1),
            Some(b'[') => class_match(g, gi, t[ti]),
            Some(c) if *c == t[ti] => Some(gi + 1),
            Some(_) | None => None,
        };
        match (step, star) {
            (Some(next), _) => {
                gi = next;
                ti += 1;
            }
            (None, Some((sg, st))) => {
                star = Some((sg, st + 1));
                gi = sg + 1;
                ti = st + 1;
            }
            (None, None) => return false,
        }
    }
    g[gi..].iter().all(|c| *c == b'*')
}

/// Matches one byte against the class that begins at `g[at]`; gives the index behind it. `!` or `^` turns it round.
fn class_match(g: &[u8], at: usize, byte: u8) -> Option<usize> {
    let end = at + g[at..].iter().position(|c| *c == b']')?;
    let not = matches!(g[at + 1], b'!' | b'^');
    let mut i = at + 1 + usize::from(not);
    let mut hit = false;
    while i < end {
        if i + 2 < end && g[i + 1] == b'-' {
            hit |= (g[i]..=g[i + 2]).contains(&byte);
            i += 3;
        } else {
            hit |= g[i] == byte;
            i += 1;
        }
    }
    (hit != not).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEP: &str = "kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/failover.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
        kernel/net/core/failover.ko.xz:\nkernel/drivers/virtio/virtio.ko.xz:\nkernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-mod.ko.xz\n\
        kernel/drivers/md/dm-mod.ko.xz:\nkernel/fs/crc.ko.xz:\n";
    const ALIAS: &str =
        "# comment\nalias virtio:d00000001v* virtio_net\nalias pci:v00008086d0000100Esv*sd*bc*sc*i* e1000\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let index = ModuleIndex::parse(DEP, ALIAS, "softdep virtio_net pre: crc post: nothing\n");
        assert_eq!(index.matching("virtio:d00000001v00001AF4").collect::<Vec<_>>(), ["virtio_net"]);
        assert_eq!(index.matching("pci:v00008086d0000100Esv0sd0bc2sc0i0").collect::<Vec<_>>(), ["e1000"]);
        let names = |m: &str, loaded: &[&str]| {
            let loaded = loaded.iter().map(|s| (*s).to_owned()).collect();
            index.load_order(m, &loaded).into_iter().map(|(n, _)| n).collect::<Vec<_>>()
        };
        assert_eq!(names("virtio_net", &[]), ["crc", "virtio", "failover", "virtio_net"]);
        assert_eq!(names("virtio-net", &["virtio"]), ["crc", "failover", "virtio_net"]);
        assert_eq!(names("dm-verity", &[]), ["dm_mod", "dm_verity"]);
        assert!(names("not_there", &[]).is_empty());
        assert!(index.is_network("virtio_net") && !index.is_network("failover") && !index.is_network("not_there"));
    }

    #[test]
    fn a_soft_dependency_may_be_an_alias_of_several_modules() {
        let dep =
            "kernel/lib/libcrc32c.ko.xz:\nkernel/crypto/crc32c-intel.ko.xz:\nkernel/crypto/crc32c_generic.ko.xz:\n";
        let alias = "alias crypto-crc32c crc32c_intel\nalias crc32c crc32c_intel\nalias crc32c crc32c_generic\n";
        let index = ModuleIndex::parse(dep, alias, "softdep libcrc32c pre: crc32c\n");
        let order: Vec<String> = index.load_order("libcrc32c", &HashSet::new()).into_iter().map(|(n, _)| n).collect();
        assert_eq!(order, ["crc32c_intel", "crc32c_generic", "libcrc32c"]);
    }

    #[test]
    fn what_is_to_follow_a_module_follows_it() {
        let dep = "kernel/a.ko:\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\nkernel/d.ko:\n";
        let soft = "softdep a post: b pre: d post: absent a\nsoftdep d post: a\n";
        let order: Vec<String> = ModuleIndex::parse(dep, "", soft)
            .load_order("a", &HashSet::new())
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(order, ["d", "a", "c", "b"], "each once, rings or not");
    }

    #[test]
    fn dashes_are_underscores_as_in_names_but_not_in_ranges() {
        let alias = "alias platform:dmi_ipmi_si ipmi_si\nalias acpi*:[A-C]-IPI000[0-3]:* ipmi-x\n";
        let index = ModuleIndex::parse("", alias, "");
        assert_eq!(index.matching("platform:dmi-ipmi-si").collect::<Vec<_>>(), ["ipmi_si"]);
        assert_eq!(index.matching("acpi1:B_IPI0001:x").collect::<Vec<_>>(), ["ipmi_x"]);
        assert_eq!(index.matching("acpi1:B-IPI0002:").collect::<Vec<_>>(), ["ipmi_x"]);
        assert_eq!(index.matching("acpi1:--IPI0002:").count(), 0);
    }

    #[test]
    fn globs() {
        assert!(glob_match("a*c?[0-9A]", "abbbcx7") && glob_match("*", "") && glob_match("a*", "a"));
        assert!(glob_match("a[!0-9]", "ax") && !glob_match("a[^0-9]", "a7") && glob_match("[a^]", "^"));
        assert!(!glob_match("a[0-9", "a1") && !glob_match("a?", "a") && !glob_match("", "a"));
    }

    proptest! {
        #[test]
        fn a_star_matches_what_stands_in_its_place(a in "[a-z]{0,8}", b in "[a-z]{0,8}", mid in "[a-z:0-9]{0,8}") {
            let (glob, text) = (format!("{a}*{b}"), format!("{a}{mid}{b}"));
            prop_assert!(glob_match(&glob, &text));
        }

        #[test]
        fn never_panics(glob in ".{0,20}", text in ".{0,20}") {
            glob_match(&glob, &text);
        }
    }
}

//! What the directories of a FAT32 name, by one copy of its table, and where the two do not fit.

use super::super::block::Block;
use super::{DEPTH, Fat, LAST, Node, bad};
use std::collections::HashSet;
use std::io;

/// Which clusters something names, or may.
pub(super) struct Tree {
    pub held: Vec<bool>,
    /// Clusters at which a chain breaks off, or meets another.
    pub knots: HashSet<u32>,
    /// Chains that do, or are too short for their file.
    pub broken: usize,
    /// Clusters of directories.
    directories: HashSet<u32>,
    /// A name has a size and no cluster, or a cluster and no size: what was below it, if it was a directory, is not known.
    unsure: bool,
}

impl Tree {
    /// Whether nothing named it until now.
    fn hold(&mut self, cluster: u32) -> bool {
        !std::mem::replace(&mut self.held[cluster as usize], true)
    }

    fn breaks(&mut self, at: u32) {
        self.knots.insert(at);
        self.broken += 1;
    }
}

impl<B: Block> Fat<B> {
    /// A broken chain costs its file. One of a directory is an error: what it names is not known.
    pub(super) fn tree(&self) -> io::Result<Tree> {
        let held = vec![false; self.table.len()];
        let mut tree = Tree { held, knots: HashSet::new(), broken: 0, directories: HashSet::new(), unsure: false };
        self.walk(self.geometry.root, 0, &mut tree)?;
        if tree.unsure {
            tree.held.fill(true);
        }
        Ok(tree)
    }

    fn walk(&self, directory: u32, depth: usize, tree: &mut Tree) -> io::Result<()> {
        for cluster in self.chain(directory)? {
            tree.directories.insert(cluster);
            if !tree.hold(cluster) {
                tree.breaks(cluster);
            }
        }
        if depth >= DEPTH {
            return Err(bad("directories lie deeper than any loader's"));
        }
        for node in self.nodes(directory)? {
            if !node.directory {
                self.follow(&node, tree);
            } else if node.cluster != 0 && !tree.directories.contains(&node.cluster) {
                self.walk(node.cluster, depth + 1, tree)?;
            }
        }
        Ok(())
    }

    fn follow(&self, file: &Node, tree: &mut Tree) {
        let (mut next, mut last, mut length) = (file.cluster, file.cluster, 0);
        while self.is_cluster(next) && tree.hold(next) {
            length += self.cluster_bytes() as u64;
            last = next;
            next = self.table[next as usize];
        }
        let is_empty = (file.cluster, file.size) == (0, 0);
        tree.unsure |= (file.cluster == 0) != (file.size == 0);
        if self.is_cluster(next) {
            tree.breaks(next);
        } else if !is_empty && (next < LAST || length < u64::from(file.size)) {
            tree.breaks(last);
        }
    }
}

//! Everything that can stop a build, each with what to do about it.

use crate::site_error::is_full;
use std::path::{Path, PathBuf};

/// Why an image was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The recipe is not valid.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error(
        "no space is left for {path}: no release was made or changed. Free some on its file system, where old folders \
         of DIR/build and DIR/cache are the first to go, and build again"
    )]
    DiskFull {
        /// Which file.
        path: PathBuf,
    },
    /// A program found the disk full.
    #[error(
        "no space was left while {doing}: {line}. No release was made or changed. Free some there (work is done in the \
         cache, which --cache names, and where TMPDIR says), and build again"
    )]
    DiskFullInTool {
        /// What for.
        doing: &'static str,
        /// Its own words, which name the file.
        line: String,
    },
    /// An allow-list names a file that the root does not have.
    #[error(
        "image {recipe}: allow_files of [[exec]] names {path}, which is no file of this root; symbolic links are not \
         followed"
    )]
    NoSuchProgram {
        /// The image.
        recipe: String,
        /// Which file.
        path: String,
    },
    /// An allow-list is not one that a machine takes.
    #[error("image {recipe}: [[exec]]: {detail}")]
    AllowList {
        /// The image.
        recipe: String,
        /// What is wrong.
        detail: String,
    },
    /// What is built does not fit the disk's partitions.
    #[error("[disk] {key} = {has} bytes is too small: this release needs {needed}")]
    DiskTooSmall {
        /// Which setting.
        key: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes set.
        has: u64,
    },
    /// The site directory cannot be used.
    #[error(transparent)]
    Site(#[from] crate::site_error::SiteError),
    /// The agent's binary is missing.
    #[error(
        "no agent binary at {path}; build it with `cargo build -p kiln-agent --profile agent --target x86_64-unknown-linux-musl`, or name it with --agent"
    )]
    NoAgent {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The agent's binary is not a static ELF program: it could not start in the initramfs.
    #[error("{path} is not a static x86_64 ELF program, so it cannot run as PID 1 of an initramfs: {detail}")]
    AgentNotStatic {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// Programs are missing on this host.
    #[error("missing on this machine: {}; install with `apt-get install {}`", programs.join(", "), packages.join(" "))]
    MissingPrograms {
        /// Which programs.
        programs: Vec<String>,
        /// Debian packages that hold them.
        packages: Vec<String>,
    },
    /// This user may not make user namespaces.
    #[error(
        "building as {user} needs a range of subordinate ids, and {detail}; add one with `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`, or build as root"
    )]
    NoSubIds {
        /// Who builds.
        user: String,
        /// What is missing.
        detail: String,
    },
    /// apt on this host names no Debian mirror.
    #[error(
        "this machine's apt names no Debian mirror: `apt-get indextargets` lists none; add one to /etc/apt/sources.list.d and run `apt-get update`"
    )]
    NoMirror,
    /// The archive keyring is not there.
    #[error("{path} is missing; install it with `apt-get install debian-archive-keyring`")]
    NoKeyring {
        /// Where it should be.
        path: PathBuf,
    },
    /// An external program failed.
    #[error("{program} failed ({status}) while {doing}; its last words:\n{last_words}")]
    Tool {
        /// Which program.
        program: String,
        /// What for.
        doing: &'static str,
        /// Its exit status.
        status: String,
        /// The end of its standard error.
        last_words: String,
    },
    /// The mirror changed while it was read, twice in a row.
    #[error("the Debian mirror changed while packages were being read from it; try again")]
    MirrorMoved,
    /// A package index has no usable date.
    #[error("the mirror's index {path} has no readable Date line")]
    IndexDate {
        /// Which file.
        path: PathBuf,
    },
    /// What the packages hold is not what the build needs.
    #[error("{path} is missing from the packages of suite {suite}: is {package} the right package?")]
    PackageLacks {
        /// Which file.
        path: String,
        /// The suite.
        suite: String,
        /// The package looked at.
        package: String,
    },
    /// A tar could not be understood.
    #[error("{what} at byte {offset} of {path}")]
    Tar {
        /// What is wrong.
        what: &'static str,
        /// Where.
        offset: u64,
        /// In which file.
        path: PathBuf,
    },
    /// A place named in the recipe is not in the root.
    #[error("recipe {recipe}: {key} names {path}, and the root has no such directory")]
    NoSuchDirectory {
        /// Recipe name.
        recipe: String,
        /// Which list.
        key: &'static str,
        /// Which path.
        path: String,
    },
    /// A program named in the recipe is not in the root.
    #[error(
        "recipe {recipe}: {key} names the program {path}, and the root has no executable file of that path (it is looked \
         for as packages ship it: /usr/bin/x, not /bin/x)"
    )]
    NoDeclaredProgram {
        /// Recipe name.
        recipe: String,
        /// Which list.
        key: &'static str,
        /// Which path.
        path: String,
    },
    /// A unit named in the recipe is not in the root, or is masked.
    #[error("recipe {recipe}: {key} names {unit}, and the root has no such unit, or it is masked")]
    NoSuchUnit {
        /// Recipe name.
        recipe: String,
        /// Which list.
        key: &'static str,
        /// Which unit.
        unit: String,
    },
    /// The owner of a secret or of the certificate is nobody.
    #[error(
        "recipe {recipe}: [[secret]] or [certificate] names the owner {user}, and the root's /etc/passwd has no such user"
    )]
    NoSuchUser {
        /// Recipe name.
        recipe: String,
        /// Which user.
        user: String,
    },
    /// The recipe leaves out a file of which another name stays.
    #[error(
        "recipe {recipe}: {target} is left out or replaced, and {path} is another name of the same file; exclude both"
    )]
    HalfExcluded {
        /// Recipe name.
        recipe: String,
        /// The name that stays.
        path: String,
        /// The name that goes.
        target: String,
    },
    /// The initramfs cannot hold something.
    #[error(transparent)]
    Initramfs(crate::cpio::CpioError),
    /// zstd failed.
    #[error("cannot compress the initramfs: {0}")]
    Compress(std::io::Error),
    /// Kernel modules cannot be gathered.
    #[error(transparent)]
    Modules(#[from] crate::modules::ModuleError),
    /// The UKI cannot be put together.
    #[error(transparent)]
    Uki(#[from] crate::uki::UkiError),
    #[error("what a TPM will measure cannot be predicted: {source}")]
    Measured { source: kiln_release::pe::PeError },
    /// The root file system cannot be protected.
    #[error("cannot make the verity tree: {0}")]
    Verity(String),
}

impl BuildError {
    /// For `map_err` on what changes a file.
    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| {
            let path = path.to_owned();
            if is_full(&source) { Self::DiskFull { path } } else { Self::Write { path, source } }
        }
    }
}

/// Why a recipe is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// It cannot be read.
    #[error("cannot read recipe {path}: {detail}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// It is not the TOML this reader knows, or a value is not allowed.
    #[error("{path}:{line}:{column}: {message}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong and what is allowed.
        message: String,
    },
    /// A unit that needs a secret or the machine's certificate would start before that is there.
    #[error(
        "{path}: {unit} needs a secret or a certificate, and `enable` would start it without: their coming starts it"
    )]
    Starts {
        /// Which file.
        path: PathBuf,
        /// Which unit.
        unit: String,
    },
    /// A key that must be there is not.
    #[error("{path}: {key} is missing; {hint}")]
    Missing {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What it is for.
        hint: &'static str,
    },
    /// Recipes extend each other in a ring, or too deeply.
    #[error("{path}: `extends` goes deeper than {limit} recipes; do they extend each other in a ring?")]
    TooDeep {
        /// Which file.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

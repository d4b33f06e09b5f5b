//! Who started whom.

use kiln_protocol::{EXEC_ANCESTORS, ExecAncestor};
use std::path::Path;

/// A process and those that started it (proc_pid_stat(5)).
pub(super) fn ancestry(proc: &Path, pid: i32) -> Vec<ExecAncestor> {
    let mut found = Vec::new();
    let mut next = u32::try_from(pid).ok().filter(|pid| *pid > 0);
    while let Some(pid) = next
        && found.len() < EXEC_ANCESTORS
    {
        let of = proc.join(pid.to_string());
        let Ok(stat) = std::fs::read_to_string(of.join("stat")) else { break };
        // The name may hold anything, parentheses too.
        let Some((comm, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')) else { break };
        let exe = std::fs::read_link(of.join("exe")).map(|exe| exe.to_string_lossy().into_owned());
        found.push(ExecAncestor { pid, comm: comm.to_owned(), exe: exe.unwrap_or_default() });
        next = rest.split_whitespace().nth(1).and_then(|parent| parent.parse().ok()).filter(|parent| *parent > 0);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_started_whom_is_read_from_proc() {
        let own = i32::try_from(std::process::id()).unwrap();
        let found = ancestry(Path::new("/proc"), own);
        assert_eq!(found[0].pid, std::process::id());
        assert_eq!(found[0].exe, std::env::current_exe().unwrap().to_str().unwrap());
        assert_eq!(found[1].pid, std::os::unix::process::parent_id());
        assert!(found.len() <= EXEC_ANCESTORS);
        let temp = tempfile::tempdir().unwrap();
        for (pid, stat) in [(7, "7 (a) (b) S 5 7 7"), (5, "5 (loop) S 7 5 5")] {
            std::fs::create_dir(temp.path().join(pid.to_string())).unwrap();
            std::fs::write(temp.path().join(format!("{pid}/stat")), stat).unwrap();
        }
        let found = ancestry(temp.path(), 7);
        assert_eq!(found.len(), EXEC_ANCESTORS, "one that makes itself its own ancestor ends");
        assert_eq!((found[0].comm.as_str(), found[1].comm.as_str()), ("a) (b", "loop"));
        assert!(ancestry(temp.path(), 9).is_empty());
    }
}

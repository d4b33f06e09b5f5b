//! What is told of allow-listing: counts since the boot, and the newest violations, the same ones together.

use kiln_protocol::{EXEC_VIOLATIONS, ExecState, ExecVerdict, ExecViolation};

/// Counts a violation, and keeps it if there is none like it. The ancestry kept is the first one's.
pub fn note(state: &mut ExecState, violation: ExecViolation) {
    match violation.verdict {
        ExecVerdict::Denied => state.denied += 1,
        ExecVerdict::Reported => state.reported += 1,
        ExecVerdict::LateDenied | ExecVerdict::LateAllowed => state.late += 1,
    }
    let known = state.violations.iter().position(|known| known.is_same(&violation));
    if let Some(mut known) = known.map(|at| state.violations.remove(at)) {
        known.count += violation.count;
        known.at_ms = violation.at_ms;
        state.violations.push(known);
        return;
    }
    if state.violations.len() >= EXEC_VIOLATIONS {
        state.violations.remove(0);
    }
    state.violations.push(violation);
}

/// Whether one like it is listed, and its ancestry need not be read.
pub fn knows(state: &ExecState, violation: &ExecViolation) -> bool {
    state.violations.iter().any(|known| known.is_same(violation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_again_is_counted_and_others_push_out_the_oldest() {
        let mut state = ExecState::default();
        let violation = |path: &str, verdict, at_ms| ExecViolation {
            path: path.into(),
            sha256: None,
            verdict,
            ancestry: Vec::new(),
            at_ms,
            count: 1,
        };
        for at_ms in 0..100 {
            note(&mut state, violation("/a", ExecVerdict::Denied, at_ms));
        }
        note(&mut state, violation("/a", ExecVerdict::Reported, 100));
        assert_eq!((state.denied, state.reported, state.violations.len()), (100, 1, 2));
        assert_eq!((state.violations[0].count, state.violations[0].at_ms), (100, 99));
        assert!(knows(&state, &violation("/a", ExecVerdict::Denied, 5)));
        for n in 0..EXEC_VIOLATIONS {
            note(&mut state, violation(&format!("/{n}"), ExecVerdict::LateAllowed, 200));
        }
        assert_eq!(state.violations.len(), EXEC_VIOLATIONS);
        assert!(!knows(&state, &violation("/a", ExecVerdict::Denied, 5)));
        assert_eq!(state.late, 16);
    }
}

//! A machine between memory and the database.

use crate::machine::Machine;

impl Machine {
    /// As it was stored, with what is never stored of it: `held` is it as it was known, and could not be stored. What the
    /// caller keeps of it (the configuration's word, its key's revocation) is the caller's to put in again.
    #[must_use]
    pub fn put_back(self, held: Self) -> Self {
        let Self { heard_at, code, unsigned, past, .. } = held;
        Self { heard_at, code, unsigned, past, ..self }
    }
}

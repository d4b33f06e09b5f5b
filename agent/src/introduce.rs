//! The machine's side of the short approval code: it commits itself to a nonce, hears the server's, shows its own, and
//! has the code on its screen that the server has on its page. See `kiln_protocol::Introduction`.

use crate::api::Api;
use crate::error::{AgentError, Result};
use crate::memory::random;
use kiln_protocol::{ApprovalCode, Introduction, KeyId, MachineId, Nonce, approval_code, commitment};
use kiln_release::hex;

/// Both steps. The key of the server is the one that its connection showed.
pub async fn introduce(api: &mut Api, machine: &MachineId, key: &KeyId) -> Result<ApprovalCode> {
    let mine: Nonce = hex::encode(&random()?).parse().expect("32 bytes are 64 hex digits");
    let commit = Introduction::Commit { machine: machine.clone(), commitment: commitment(&mine) };
    let theirs = api.introduce(&commit).await?.nonce;
    let reveal = Introduction::Reveal { machine: machine.clone(), nonce: mine.clone() };
    let again = api.introduce(&reveal).await?.nonce;
    let server = api.server_key.clone().ok_or(AgentError::NoServer)?;
    if again != theirs {
        let reason = "the boot server changed its mind during the introduction".to_owned();
        return Err(AgentError::Unreachable { url: api.server().to_owned(), reason });
    }
    Ok(approval_code(key, &server, &mine, &theirs))
}

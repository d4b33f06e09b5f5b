//! Other keys that report under a machine's id, and the word of the person who makes one of them its own.
//!
//! Anybody can report under an id. So nothing makes another key the machine's but a person who names it, by the beginning
//! of its fingerprint: the machine's own console shows it, as what the server answers there says it.

use crate::Millis;
use crate::error::Refusal;
use crate::event::Action;
use crate::machine::Machine;
use kiln_protocol::KeyId;

/// Other keys remembered of one machine, the first and the newest: whoever makes up more drives out only those that came
/// later and do not speak.
pub const STRANGERS_KEPT: usize = 8;
/// Fewest hex digits by which a person names a key: all that are shown. Another key that begins with eight is made up in hours.
pub const KEY_DIGITS: usize = SHOWN;
/// Hex digits of a key in what a person is told to run: nobody makes up another key that begins so.
const SHOWN: usize = 16;

/// The beginning of a key's fingerprint.
fn short(key: &KeyId) -> &str {
    &key.as_str()[..SHOWN]
}

/// Each by so much of its beginning, what is shown of any at least, as tells it from the others.
fn list(keys: &[KeyId]) -> String {
    let common = |a: &KeyId, b: &KeyId| a.as_str().bytes().zip(b.as_str().bytes()).take_while(|(a, b)| a == b).count();
    let beginning = |key: &KeyId| {
        let others = keys.iter().filter(|other| *other != key);
        let digits = others.map(|other| common(key, other) + 1).max().unwrap_or(0).max(SHOWN);
        key.as_str().chars().take(digits).collect::<String>()
    };
    keys.iter().map(beginning).collect::<Vec<_>>().join(", ")
}

impl Machine {
    /// The configuration names the only key that may speak for it, or none. A key that came first and is another is
    /// let go: it was a stranger's.
    pub fn pin(&mut self, key: Option<&KeyId>) {
        self.pinned = key.cloned();
        if key.is_some() && self.key.as_ref() != key {
            if let Some(old) = self.key.take() {
                self.hear_stranger(&old);
            }
            self.strangers.retain(|other| Some(other) != key);
            self.previous_key = None;
            self.agent_seen = None;
        }
    }

    /// What is said of a key that the configuration does not name.
    pub(crate) fn not_the_pinned_one(&self, key: &KeyId) -> String {
        let title = self.title();
        format!(
            "kiln.toml names the identity key of {title}; another ({}…) that reports under its id gets nothing: it is \
             another machine's, or the firmware settings were erased; if so, put the new key there (`kiln machine \
             show {title}` prints it)",
            &key.as_str()[..12]
        )
    }

    /// Remembers a key that reported under its id and is not its own. Whether it was not remembered.
    pub(crate) fn hear_stranger(&mut self, key: &KeyId) -> bool {
        let known = self.strangers.iter().position(|other| other == key);
        if let Some(at) = known {
            // The newest last: those that speak stay. The first stays where it is.
            if at > 0 {
                self.strangers[at..].rotate_left(1);
            }
            return false;
        }
        self.strangers.push(key.clone());
        if self.strangers.len() > STRANGERS_KEPT {
            self.strangers.remove(1);
        }
        true
    }

    /// Whether whoever holds this other key said in its newest report that it can use no TPM, while the machine's own key is
    /// sealed in one. Whether that is news.
    pub(crate) fn note_without_tpm(&mut self, key: &KeyId, says_so: bool) -> bool {
        let known = self.without_tpm.contains(key);
        self.without_tpm.retain(|other| other != key && self.strangers.contains(other));
        let kept = says_so && self.strangers.contains(key);
        if kept {
            self.without_tpm.push(key.clone());
        }
        known != kept
    }

    /// What to do where the machine itself holds this key, because its TPM did not give its own one out; none: whoever holds it
    /// said no such thing. Nothing is lost: no command is made up that puts a weaker key in its place.
    fn sealed_away(&self, key: &KeyId) -> Option<String> {
        let title = self.title();
        self.without_tpm.contains(key).then(|| {
            format!(
                "the key of {title} is sealed in its TPM, and whoever holds the other one can use no TPM. If it is {title} \
                 itself, switch its TPM on in its firmware's setup, see that it boots a release that uses one, and restart it: \
                 its own key speaks again then. Only where its TPM is gone for good is the other one to be named to `kiln \
                 machine clear`"
            )
        })
    }

    /// Why no person's clear makes another key its own; none: one that names the key does.
    fn keeps_its_own(&self) -> Option<String> {
        let title = self.title();
        if self.pinned.is_some() {
            Some(format!("kiln.toml names the key of {title}; put the new one there and restart `kiln serve`"))
        } else if self.position.is_some() {
            Some(format!("{title} is known by its position; `kiln machine retire {title}` ends that"))
        } else {
            None
        }
    }

    /// What to run if whoever holds this key is the machine itself.
    pub(crate) fn how_to_take(&self, key: &KeyId) -> String {
        format!("run `kiln machine clear {} --key {}`", self.title(), short(key))
    }

    /// What whoever holds another key than its own is told.
    pub(crate) fn not_its_key(&self, key: &KeyId) -> String {
        let title = self.title();
        match self.keeps_its_own() {
            Some(why) => format!("another identity key is {title}'s, and stays it: {why}"),
            None => match self.sealed_away(key) {
                Some(what) => format!("another identity key is {title}'s, and stays it: {what}"),
                None => {
                    format!("another identity key is {title}'s: if this is {title} itself, {}", self.how_to_take(key))
                }
            },
        }
    }

    /// The other keys that wait for a person's word, and what takes one; none: there is none.
    pub fn other_keys_wait(&self) -> Option<String> {
        let title = self.title();
        let (who, how) = match &self.strangers[..] {
            [] => return None,
            [key] => {
                let how = self.sealed_away(key);
                let how =
                    how.unwrap_or_else(|| format!("if the console of {title} names it, {}", self.how_to_take(key)));
                ("another identity key reported under its id and gets nothing".to_owned(), how)
            }
            keys => {
                let sealed: Vec<KeyId> = keys.iter().filter(|key| self.without_tpm.contains(*key)).cloned().collect();
                let but = match &sealed[..] {
                    [] => String::new(),
                    sealed => format!(
                        "; none of {} before its TPM was looked at: its own key is sealed there, and whoever holds these can \
                         use no TPM",
                        list(sealed)
                    ),
                };
                let how = format!(
                    "take the one that the console of {title} names by `kiln machine clear {title} --key` and one of {}{but}",
                    list(keys)
                );
                (format!("{} other identity keys reported under its id and get nothing", keys.len()), how)
            }
        };
        Some(format!("{who}; {}", self.keeps_its_own().unwrap_or(how)))
    }

    /// The key, heard under its id and not its own, that a person means by the beginning of its fingerprint.
    pub fn heard_key(&self, digits: &str) -> Result<KeyId, Refusal> {
        let machine = self.title().to_owned();
        let wanted = digits.to_ascii_lowercase();
        if wanted.len() < KEY_DIGITS || !wanted.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Refusal::KeyDigits { machine, digits: KEY_DIGITS });
        }
        if let Some(why) = self.keeps_its_own() {
            return Err(Refusal::KeyStays { why });
        }
        let own = self.key.as_ref().filter(|key| !self.strangers.contains(*key));
        let fits: Vec<KeyId> =
            self.strangers.iter().chain(own).filter(|key| key.as_str().starts_with(&wanted)).cloned().collect();
        match &fits[..] {
            [key] if Some(key) == self.key.as_ref() => Err(Refusal::KeyIsItsOwn { machine }),
            [key] => Ok(key.clone()),
            [] if self.strangers.is_empty() => Err(Refusal::NoOtherKey { machine }),
            [] => Err(Refusal::NoSuchKey { machine, heard: list(&self.strangers) }),
            several => Err(Refusal::AmbiguousKey { machine, digits: wanted, fits: list(several) }),
        }
    }

    /// A person says that this key is the machine's. That ends what held it, too: whoever names a key has looked.
    pub(crate) fn adopt(&mut self, key: KeyId, now: Millis, out: &mut Vec<Action>) {
        if let Some(why) = self.keeps_its_own() {
            out.push(Action::Say { warn: true, text: format!("its key stays: {why}") });
            return;
        }
        self.end_holds(now, out);
        out.push(Action::Say {
            warn: true,
            text: format!("its identity key is {} now, by a person's word", short(&key)),
        });
        self.strangers.retain(|other| *other != key);
        self.previous_key = None;
        self.key = Some(key);
    }
}

//! An ID token and whether it is accepted: JWS compact serialization (RFC 7515), RS256 and ES256 (RFC 7518) by ring, the
//! provider's keys as a JWK set (RFC 7517), the checks of OpenID Connect Core 1.0, section 3.1.3.7. Pure: text, keys
//! and time in, a person or a reason out. Nothing of the payload is read before its signature is verified.

use ring::signature::{ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::Value;

/// Longest ID token.
const MAX_TOKEN: usize = 16 << 10;
/// Keys of a set that are looked at.
const MAX_KEYS: usize = 64;
/// Groups that are looked at, and their longest name.
const MAX_GROUPS: usize = 1_000;
/// Clocks differ by so many seconds.
const SKEW: i64 = 60;
/// A token that was issued longer ago belongs to no log-in of now.
const OLD: i64 = 10 * 60;

/// An ID token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TokenError {
    #[error("it is no signed JWT: {0}")]
    Form(&'static str),
    #[error("its algorithm {0:?} is not RS256 or ES256")]
    Algorithm(String),
    #[error("the provider has no key {0:?} of its kind")]
    UnknownKey(String),
    #[error("its signature does not hold")]
    Signature,
    #[error("its {claim} is {got:?}, not {expected:?}")]
    Claim { claim: &'static str, expected: String, got: String },
    #[error("it is for several audiences and names none as the one that asked")]
    Azp,
    #[error("it expired, or this host's clock is wrong")]
    Expired,
    #[error("it was issued in the future or long ago, or this host's clock is wrong")]
    Issued,
}

/// What is expected of it.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// The provider.
    pub issuer: &'a str,
    /// This server's name there.
    pub client_id: &'a str,
    /// What was sent along.
    pub nonce: &'a str,
    /// The claim that lists groups.
    pub groups_claim: &'a str,
    /// Unix seconds.
    pub now: i64,
}

/// Who logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// The provider's lasting name for that person.
    pub subject: String,
    /// In which groups.
    pub groups: Vec<String>,
}

/// A key of the provider, as far as it is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default, rename = "use")]
    usage: Option<String>,
    #[serde(default)]
    alg: Option<String>,
    #[serde(default)]
    crv: Option<String>,
    #[serde(default)]
    n: Option<String>,
    #[serde(default)]
    e: Option<String>,
    #[serde(default)]
    x: Option<String>,
    #[serde(default)]
    y: Option<String>,
}

/// The provider's keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Jwks(Vec<Jwk>);

impl Jwks {
    /// Reads a set. Keys of other kinds are passed over.
    pub fn parse(text: &[u8]) -> Result<Self, TokenError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set =
            serde_json::from_slice(text).map_err(|_| TokenError::Form("the provider's keys are no JWK set"))?;
        Ok(Self(set.keys.into_iter().take(MAX_KEYS).filter_map(|key| serde_json::from_value(key).ok()).collect()))
    }

    fn key(&self, kty: &str, alg: &str, kid: Option<&str>) -> Result<&Jwk, TokenError> {
        let fits = |key: &&Jwk| {
            key.kty == kty
                && key.usage.as_deref().is_none_or(|usage| usage == "sig")
                && key.alg.as_deref().is_none_or(|a| a == alg)
                && kid.is_none_or(|kid| key.kid.as_deref() == Some(kid))
        };
        let mut all = self.0.iter().filter(fits);
        match (all.next(), all.next()) {
            (Some(key), None) => Ok(key),
            // Without a key id only the provider's one key of this kind can be meant.
            (None | Some(_), _) => Err(TokenError::UnknownKey(kid.unwrap_or_default().to_owned())),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audience,
    exp: i64,
    iat: i64,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    nonce: Option<String>,
    #[serde(default)]
    azp: Option<String>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// RFC 4648, section 5, without padding; the unused bits of the last character must be 0, so that a text has one form.
pub(super) fn base64url(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0_u32);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        held = held << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push(u8::try_from(held >> bits & 0xff).ok()?);
            held &= (1 << bits) - 1;
        }
    }
    (bits < 6 && held == 0).then_some(out)
}

/// The other way round.
pub(super) fn to_base64url(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let held = chunk.iter().fold(0_u32, |held, byte| held << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for n in 0..=chunk.len() {
            out.push(char::from(LETTERS[(held >> (18 - 6 * n) & 63) as usize]));
        }
    }
    out
}

/// Verifies an ID token.
pub fn verify(token: &str, keys: &Jwks, expected: &Expected<'_>) -> Result<Person, TokenError> {
    if token.len() > MAX_TOKEN {
        return Err(TokenError::Form("it is longer than 16 KiB"));
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Form("three parts"))?;
    let (header, payload) = signed.split_once('.').ok_or(TokenError::Form("three parts"))?;
    let decode = |part| base64url(part).ok_or(TokenError::Form("a part is not base64url"));
    let header: Header =
        serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Form("its header cannot be read"))?;
    if header.crit.is_some() {
        return Err(TokenError::Form("its header demands an extension"));
    }
    let signature = decode(signature)?;
    check_signature(&header, keys, signed.as_bytes(), &signature)?;
    let claims: Claims =
        serde_json::from_slice(&decode(payload)?).map_err(|_| TokenError::Form("its claims cannot be read"))?;
    check_claims(claims, expected)
}

/// The algorithm is one of two that the caller knows, never the token's choice of how a key is used.
fn check_signature(header: &Header, keys: &Jwks, signed: &[u8], signature: &[u8]) -> Result<(), TokenError> {
    let part =
        |text: &Option<String>| text.as_deref().and_then(base64url).ok_or(TokenError::Form("a key cannot be read"));
    match header.alg.as_str() {
        "RS256" => {
            let key = keys.key("RSA", "RS256", header.kid.as_deref())?;
            let key = RsaPublicKeyComponents { n: part(&key.n)?, e: part(&key.e)? };
            key.verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature).map_err(|_| TokenError::Signature)
        }
        "ES256" => {
            let key = keys.key("EC", "ES256", header.kid.as_deref())?;
            if key.crv.as_deref() != Some("P-256") {
                return Err(TokenError::Form("its key is on another curve"));
            }
            let point = [vec![4], part(&key.x)?, part(&key.y)?].concat();
            let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point);
            key.verify(signed, signature).map_err(|_| TokenError::Signature)
        }
        other => Err(TokenError::Algorithm(other.chars().take(16).collect())),
    }
}

fn check_claims(claims: Claims, expected: &Expected<'_>) -> Result<Person, TokenError> {
    let is = |claim, expected: &str, got: &str| {
        let short = |text: &str| text.chars().take(200).collect();
        let wrong = || TokenError::Claim { claim, expected: short(expected), got: short(got) };
        if expected == got { Ok(()) } else { Err(wrong()) }
    };
    is("iss", expected.issuer, &claims.iss)?;
    match &claims.aud {
        Audience::One(aud) => is("aud", expected.client_id, aud)?,
        Audience::Many(all) => {
            let named = all.iter().any(|aud| aud == expected.client_id);
            is(
                "aud",
                expected.client_id,
                if named { expected.client_id } else { all.first().map_or("", String::as_str) },
            )?;
            if all.len() > 1 && claims.azp.is_none() {
                return Err(TokenError::Azp);
            }
        }
    }
    if let Some(azp) = &claims.azp {
        is("azp", expected.client_id, azp)?;
    }
    is("nonce", expected.nonce, claims.nonce.as_deref().unwrap_or_default())?;
    let now = expected.now;
    if claims.exp <= now.saturating_sub(SKEW) {
        return Err(TokenError::Expired);
    }
    let early = |at: i64| at > now.saturating_add(SKEW);
    if early(claims.iat) || claims.nbf.is_some_and(early) || claims.iat < now.saturating_sub(OLD) {
        return Err(TokenError::Issued);
    }
    // A subject is at most 255 ASCII characters (section 2); it is written into logs, so nothing else is taken.
    if claims.sub.is_empty() || claims.sub.len() > 255 || !claims.sub.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(TokenError::Form("its subject is not 1 to 255 visible ASCII characters"));
    }
    let groups = claims.rest.get(expected.groups_claim).and_then(Value::as_array);
    let groups = groups.into_iter().flatten().take(MAX_GROUPS).filter_map(|g| g.as_str().map(str::to_owned)).collect();
    Ok(Person { subject: claims.sub, groups })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::json;

    const NOW: i64 = 1_800_000_000;

    struct Provider(EcdsaKeyPair);

    impl Provider {
        fn new() -> Self {
            let rng = SystemRandom::new();
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &rng).unwrap();
            Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &rng).unwrap())
        }
        fn jwk(&self, kid: &str) -> Value {
            let point = self.0.public_key().as_ref();
            let (x, y) = (to_base64url(&point[1..33]), to_base64url(&point[33..]));
            json!({ "kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "x": x, "y": y })
        }
        fn sign(&self, header: &Value, claims: &Value) -> String {
            let part = |value: &Value| to_base64url(value.to_string().as_bytes());
            let signed = format!("{}.{}", part(header), part(claims));
            let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", to_base64url(signature.as_ref()))
        }
    }

    fn set(keys: &[Value]) -> Jwks {
        Jwks::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
    }

    fn expected() -> Expected<'static> {
        Expected { issuer: "https://id", client_id: "kiln", nonce: "n", groups_claim: "groups", now: NOW }
    }

    fn claims() -> Value {
        json!({ "iss": "https://id", "sub": "ann", "aud": "kiln", "exp": NOW + 300, "iat": NOW - 5, "nonce": "n",
                "groups": ["ops", 7, "staff"] })
    }

    #[test]
    fn a_good_token_names_the_person_and_its_groups() {
        let provider = Provider::new();
        let token = provider.sign(&json!({ "alg": "ES256", "kid": "1" }), &claims());
        let person = verify(&token, &set(&[provider.jwk("1")]), &expected()).unwrap();
        assert_eq!(person, Person { subject: "ann".into(), groups: vec!["ops".into(), "staff".into()] });
    }

    #[test]
    fn keys_are_chosen_by_id_and_kind_and_never_by_the_tokens_wish() {
        let (old, new) = (Provider::new(), Provider::new());
        let header = |kid: &str| json!({ "alg": "ES256", "kid": kid });
        let token = new.sign(&header("new"), &claims());
        let unknown = |kid: &str| Err(TokenError::UnknownKey(kid.into()));
        assert_eq!(verify(&token, &set(&[old.jwk("old")]), &expected()), unknown("new"));
        assert!(verify(&token, &set(&[old.jwk("old"), new.jwk("new")]), &expected()).is_ok(), "rotated");
        let forged = old.sign(&header("new"), &claims());
        let both = set(&[old.jwk("old"), new.jwk("new")]);
        assert_eq!(verify(&forged, &both, &expected()), Err(TokenError::Signature));
        // Without a kid: only if there is one key.
        let bare = new.sign(&json!({ "alg": "ES256" }), &claims());
        assert!(verify(&bare, &set(&[new.jwk("new")]), &expected()).is_ok());
        assert_eq!(verify(&bare, &both, &expected()), unknown(""));
        for alg in ["none", "HS256", "RS512", "es256", ""] {
            let token = new.sign(&json!({ "alg": alg, "kid": "new" }), &claims());
            assert_eq!(verify(&token, &both, &expected()), Err(TokenError::Algorithm(alg.into())));
        }
        assert_eq!(
            verify(&new.sign(&json!({ "alg": "RS256", "kid": "new" }), &claims()), &both, &expected()),
            unknown("new")
        );
        let mut encryption = new.jwk("new");
        encryption["use"] = json!("enc");
        assert_eq!(verify(&token, &set(&[encryption]), &expected()), unknown("new"));
        let crit = new.sign(&json!({ "alg": "ES256", "kid": "new", "crit": ["x"] }), &claims());
        assert!(matches!(verify(&crit, &both, &expected()), Err(TokenError::Form(_))));
    }

    #[test]
    fn each_claim_is_checked() {
        let provider = Provider::new();
        let keys = set(&[provider.jwk("1")]);
        let with = |name: &str, value: Value| {
            let mut claims = claims();
            claims[name] = value;
            verify(&provider.sign(&json!({ "alg": "ES256", "kid": "1" }), &claims), &keys, &expected())
        };
        let claim =
            |r: Result<Person, TokenError>, name| matches!(r, Err(TokenError::Claim { claim, .. }) if claim == name);
        assert!(claim(with("iss", json!("https://id/")), "iss"));
        assert!(claim(with("aud", json!("other")), "aud") && claim(with("aud", json!(["a", "b"])), "aud"));
        assert!(claim(with("nonce", json!("m")), "nonce") && claim(with("nonce", json!(null)), "nonce"));
        assert!(claim(with("azp", json!("other")), "azp"));
        assert_eq!(with("aud", json!(["kiln", "other"])), Err(TokenError::Azp));
        assert!(with("aud", json!(["kiln"])).is_ok() && with("azp", json!("kiln")).is_ok());
        assert_eq!(with("exp", json!(NOW - 61)), Err(TokenError::Expired));
        assert!(with("exp", json!(NOW - 59)).is_ok());
        assert_eq!(with("iat", json!(NOW + 61)), Err(TokenError::Issued));
        assert_eq!(with("iat", json!(NOW - 601)), Err(TokenError::Issued));
        assert_eq!(with("nbf", json!(NOW + 61)), Err(TokenError::Issued));
        for sub in ["", "ann from 10.0.0.1", "ann\n", "\u{202e}nna", &"a".repeat(256)] {
            assert!(matches!(with("sub", json!(sub)), Err(TokenError::Form(_))), "{sub:?}");
        }
        assert_eq!(with("groups", json!("ops")).unwrap().groups, Vec::<String>::new());
    }

    #[test]
    fn any_flipped_character_is_refused() {
        let provider = Provider::new();
        let keys = set(&[provider.jwk("1")]);
        let token = provider.sign(&json!({ "alg": "ES256", "kid": "1" }), &claims());
        for i in 0..token.len() {
            for other in ["A", "B", "_", ".", "="] {
                let mut altered = token.clone();
                altered.replace_range(i..=i, other);
                assert!(altered == token || verify(&altered, &keys, &expected()).is_err(), "{i} {other}");
            }
        }
        for cut in 0..token.len() {
            assert!(verify(&token[..cut], &keys, &expected()).is_err());
        }
    }

    #[test]
    fn base64url_has_one_form() {
        for bytes in [&b""[..], b"f", b"fo", b"foo", b"foob", b"\xff\xfe\xfd\xfc"] {
            assert_eq!(base64url(&to_base64url(bytes)).unwrap(), bytes);
        }
        assert_eq!(to_base64url(b"foob"), "Zm9vYg");
        for bad in ["Z", "Zg==", "Zh", "Zm9+", "Zm 9v", "Zm9vYh"] {
            assert_eq!(base64url(bad), None, "{bad}");
        }
    }
}

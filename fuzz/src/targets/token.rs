//! ID tokens of an identity provider.

/// The first byte 0: claims, signed by the provider. 1: a JWK set. Else: a token.
pub mod oidc_token {
    use super::super::super::server::oidc::{Expected, Jwks, TokenError, verify};
    use super::super::chosen;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
    use serde_json::{Value, json};
    use std::sync::LazyLock;

    const NOW: i64 = 1_800_000_000;
    const ME: Expected<'static> =
        Expected { issuer: "https://id.example", client_id: "kiln", nonce: "n0", groups_claim: "groups", now: NOW };

    static RNG: LazyLock<SystemRandom> = LazyLock::new(SystemRandom::new);
    static PROVIDER: LazyLock<(EcdsaKeyPair, String)> = LazyLock::new(|| {
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &*RNG).expect("a key");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, made.as_ref(), &*RNG).expect("a key");
        let point = pair.public_key().as_ref();
        let (x, y) = (base64url(&point[1..33]), base64url(&point[33..]));
        let set = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": "k1", "use": "sig", "x": x, "y": y },
            { "kty": "RSA", "kid": "k2", "n": "AQAB", "e": "AQAB" }, { "kty": "oct" }] });
        (pair, set.to_string())
    });

    fn base64url(bytes: &[u8]) -> String {
        const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let letters = bytes.chunks(3).flat_map(|chunk| {
            let held = chunk.iter().fold(0_u32, |held, byte| held << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            (0..=chunk.len()).map(move |n| char::from(LETTERS[(held >> (18 - 6 * n) & 63) as usize]))
        });
        letters.collect()
    }

    fn signed(header: &[u8], claims: &[u8]) -> String {
        let message = format!("{}.{}", base64url(header), base64url(claims));
        let signature = PROVIDER.0.sign(&*RNG, message.as_bytes()).expect("a signature");
        format!("{message}.{}", base64url(signature.as_ref()))
    }

    fn keys() -> Jwks {
        Jwks::parse(PROVIDER.1.as_bytes()).expect("a set of keys")
    }

    const HEADER: &[u8] = br#"{"alg":"ES256","kid":"k1"}"#;

    /// What the checks of the claims must come to (OpenID Connect Core 1.0 §3.1.3.7).
    fn accepted(claims: &[u8]) {
        let token = signed(HEADER, claims);
        let result = verify(&token, &keys(), &ME);
        assert!(!matches!(result, Err(TokenError::Signature | TokenError::UnknownKey(_) | TokenError::Algorithm(_))));
        let Ok(person) = result else { return };
        let claims: Value = serde_json::from_slice(claims).expect("it was read");
        let listed = claims["aud"].as_array().is_some_and(|all| all.iter().any(|aud| aud == ME.client_id));
        assert!(claims["aud"] == ME.client_id || listed, "for another client");
        assert_eq!((&claims["iss"], &claims["nonce"]), (&ME.issuer.into(), &ME.nonce.into()));
        assert!(claims["exp"].as_i64().is_some_and(|at| at > NOW - 60), "expired");
        assert!(
            claims["iat"].as_i64().is_some_and(|at| (NOW - 600..=NOW + 60).contains(&at)),
            "issued at another time"
        );
        assert!(!person.subject.is_empty() && person.subject.bytes().all(|b| b.is_ascii_graphic()));
        assert!(person.groups.len() <= 1000);
    }

    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        match choice {
            0 => accepted(rest),
            1 => {
                if let Ok(keys) = Jwks::parse(rest) {
                    let _ = verify(&signed(HEADER, b"{}"), &keys, &ME);
                }
            }
            2 => {
                // The provider signed it: a header of its own choice, and nothing in it makes claims of nothing.
                let result = verify(&signed(rest, b"{}"), &keys(), &ME);
                assert!(result.is_err(), "no claims, and accepted");
            }
            _ => {
                let token = String::from_utf8_lossy(rest);
                assert!(verify(&token, &keys(), &ME).is_err(), "a token that the provider did not sign");
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let claims = json!({ "iss": ME.issuer, "sub": "u1", "aud": "kiln", "exp": NOW + 300, "iat": NOW, "nbf": NOW,
            "nonce": "n0", "groups": ["ops", 7, "x"] });
        let mut many = claims.clone();
        (many["aud"], many["azp"]) = (json!(["kiln", "other"]), json!("kiln"));
        let none = r#"{"alg":"none"}"#;
        let unsigned = format!("{}.{}.", base64url(none.as_bytes()), base64url(claims.to_string().as_bytes()));
        let texts = [(0_u8, claims.to_string()), (0, many.to_string()), (1, PROVIDER.1.clone()), (3, unsigned)];
        let mut seeds: Vec<Vec<u8>> = texts.iter().flat_map(|(n, text)| chosen(*n, [text.as_bytes()])).collect();
        seeds.extend(chosen(
            2,
            [HEADER, br#"{"alg":"RS256","kid":"k2"}"#, br#"{"alg":"ES256","crit":[]}"#, none.as_bytes()],
        ));
        seeds
    }
}

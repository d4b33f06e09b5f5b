//! DER, and the lists of certificates that firmware keeps.

/// Certificates.
pub mod certificate {
    use kiln_release::certificate::{certificate_key_id, certificate_spki, self_signed_certificate, spki_key_id};
    use kiln_release::pkcs7::{Certificate, Content, enveloped, signed_data};
    use kiln_release::{Signer, hex};
    use std::convert::Infallible;

    pub fn run(data: &[u8]) {
        if let Ok(id) = certificate_key_id(data) {
            let spki = certificate_spki(data).expect("two readers of one certificate");
            assert_eq!(spki_key_id(spki), id);
            assert!(certificate_key_id(&[data, &[0]].concat()).is_err(), "bytes behind its end");
        }
        if let Ok(certificate) = Certificate::parse(data) {
            let made = |content| signed_data(content, &certificate, true, |_| Ok::<_, Infallible>(vec![1; 256]));
            for content in [Content::Detached(b"x"), Content::Enclosed(b"x")] {
                let Ok(signature) = made(content);
                assert!(signature.windows(data.len()).any(|window| window == data), "the certificate lies in it whole");
                assert_eq!(enveloped(&signature)[0], 0x30);
            }
        }
        if let Ok(text) = std::str::from_utf8(data)
            && let Some(der) = hex::pem_decode("CERTIFICATE", text)
        {
            let _ = certificate_key_id(&der);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let ours = self_signed_certificate(&Signer::from_seed(&[5; 32]));
        let other = self_signed_certificate(&Signer::from_seed(&[6; 32]));
        vec![ours, other]
    }
}

/// Key objects, PEM and PKCS #8.
pub mod key_file {
    use kiln_release::{PublicKey, Signer};
    use serde_json::{Value, json};

    pub fn run(data: &[u8]) {
        if let Ok(signer) = Signer::from_pkcs8_der(data) {
            let again = Signer::from_pkcs8_der(&signer.pkcs8_der()).expect("what was written can be read");
            assert_eq!(again.public(), signer.public());
        }
        let Ok(text) = std::str::from_utf8(data) else { return };
        if let Ok(signer) = Signer::from_pkcs8_pem(text) {
            let again = Signer::from_pkcs8_pem(&signer.pkcs8_pem()).expect("what was written can be read");
            assert_eq!(again.public(), signer.public());
        }
        let Ok(object) = serde_json::from_str::<Value>(text) else { return };
        if let Ok(key) = PublicKey::from_object(&object) {
            let again = PublicKey::from_object(&key.to_object()).expect("what was written can be read");
            assert_eq!((again.id(), &again), (key.id(), &key), "one key in two forms");
            assert!(!key.verifies(b"x", b"") && !key.verifies(b"x", &[0; 64]));
            assert_eq!(key.spki_der()[0], 0x30);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let signer = Signer::from_seed(&[7; 32]);
        // Public keys that openssl made and nobody has the private ones of.
        let p256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEKwh6kNswBqJ9OkYkBsGvx9wCw+E7\nY00e81MHcr/6jglHSqTG4s7lPkSZue7I3YZa0Sm5Xnbf3w39y0cShTkWdQ==";
        let rsa = "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAoQq1hBsr5STiGeVr2942\ndHVfqcZB+ESTBSppFvaJxbKVQ8+E8DusXlTnMoYMrieTqOVpGe/ZJYG10Gb5mMPP\nFZDogKVL+kT4ckWpoM/QoaNaQ+94UfqOMMuBrf4wohx708ATgFr6dmaOjpdxNA/N\nvDs1sibiXSRsYjHAIQ+mv88LLws2XSFifZqAzZL0dT3Boq0o8TGXC0ivU73ioINf\naUDaEwxI0Qc7FYaYvw9xqyZHIp4gUt1YhiXjfMvgijHttqvl7BOjIJ1jLNUqg5cZ\nqg9IcziJ8lWccqKDk3qB+/xeYXrK7BSUlZSFYbPmQX6UaWLIA86CBrQRDebW3sCZ\n1QIDAQAB";
        let object = |kind: &str, scheme: &str, base64: &str| {
            let pem = format!("-----BEGIN PUBLIC KEY-----\n{base64}\n-----END PUBLIC KEY-----\n");
            json!({ "keytype": kind, "scheme": scheme, "keyval": { "public": pem } }).to_string().into_bytes()
        };
        vec![
            signer.pkcs8_der(),
            signer.pkcs8_pem().into_bytes(),
            signer.public().to_object().to_string().into_bytes(),
            object("ecdsa", "ecdsa-sha2-nistp256", p256),
            object("rsa", "rsassa-pss-sha256", rsa),
        ]
    }
}

/// Signature lists of db and dbx.
pub mod efi_list {
    use kiln_release::efi::{Entry, certificate_list, digest_list, entries};

    pub fn run(data: &[u8]) {
        let Some(all) = entries(data) else { return };
        let rewritten: Vec<u8> = all
            .iter()
            .flat_map(|entry| match entry {
                Entry::X509(der) => certificate_list(der),
                Entry::Sha256(digest) => <[u8; 32]>::try_from(*digest).map(|d| digest_list(&[d])).unwrap_or_default(),
                Entry::Other => Vec::new(),
            })
            .collect();
        let kept: Vec<Entry<'_>> = all
            .into_iter()
            .filter(|entry| match entry {
                Entry::X509(_) => true,
                Entry::Sha256(digest) => digest.len() == 32,
                Entry::Other => false,
            })
            .collect();
        assert_eq!(entries(&rewritten), Some(kept), "read, written and read");
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let (one, two) = (certificate_list(b"certificate"), digest_list(&[[1; 32], [2; 32]]));
        vec![[one.clone(), two.clone()].concat(), one, two, Vec::new()]
    }
}

//! What others make of what this crate writes: `veritysetup`, `openssl` and rustls.
//!
//! A tool that is not installed skips its test with a line that says so, or fails it under `make test`, which installs all.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // purity binds the crate, not the tools its tests run

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

use kiln_release::certificate::{certificate_key_id, self_signed_certificate, spki_der, spki_key_id};
use kiln_release::verity::{BLOCK, Superblock, TreeBuilder, hash_area_length};
use kiln_release::{Signer, hex};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder of this test's own under the target folder.
fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Standard output of a tool; `None` where it is not installed.
fn run(tool: &str, arguments: &[&str]) -> Option<String> {
    // Administrators' tools are not on everyone's path.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match Command::new(tool).args(arguments).env("PATH", path).output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{tool} {arguments:?}: {errors}");
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            oracle::skipped(&format!("{tool} is not installed"));
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

#[test]
fn the_tree_is_that_of_veritysetup_byte_for_byte() {
    let folder = folder("verity");
    let uuid = "12345678-9abc-4def-8123-456789abcdef";
    let uuid_bytes: [u8; 16] = hex::decode(&uuid.replace('-', "")).unwrap().try_into().unwrap();
    let salts = ["", "00", "aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899", &"5a".repeat(256)];
    // One block has no level, 128 fill one block of hashes, 129 need a second level, 16385 a third.
    for (blocks, salt) in
        [(1, salts[2]), (2, salts[0]), (128, salts[2]), (129, salts[1]), (1000, salts[3]), (16385, salts[2])]
    {
        let mut builder = TreeBuilder::new(&hex::decode(salt).unwrap(), uuid_bytes).unwrap();
        let mut data = Vec::with_capacity(blocks * BLOCK);
        for i in 0..blocks {
            let mut block = [0u8; BLOCK];
            block[..8].copy_from_slice(&(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
            builder.push_block(&block);
            data.extend_from_slice(&block);
        }
        let tree = builder.finish().unwrap();
        assert_eq!(tree.hash_area.len() as u64, hash_area_length(blocks as u64));
        let (data_path, hash_path) = (folder.join("data"), folder.join("hash"));
        std::fs::write(&data_path, &data).unwrap();
        std::fs::write(&hash_path, b"").unwrap();
        let (data_path, hash_path) = (data_path.to_str().unwrap(), hash_path.to_str().unwrap());
        let salt_argument = format!("--salt={}", if salt.is_empty() { "-" } else { salt });
        let uuid_argument = format!("--uuid={uuid}");
        let arguments = [
            "format",
            &salt_argument,
            &uuid_argument,
            "--hash=sha256",
            "--data-block-size=4096",
            "--hash-block-size=4096",
            data_path,
            hash_path,
        ];
        let Some(text) = run("veritysetup", &arguments) else { return };
        let root_hash = text.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
        assert_eq!(hex::encode(&tree.root_hash), root_hash, "{blocks} blocks");
        let written = std::fs::read(hash_path).unwrap();
        assert!(written == tree.hash_area, "hash area of {blocks} blocks differs");
        let superblock = Superblock::parse(written[..BLOCK].try_into().unwrap()).unwrap();
        assert_eq!((superblock.data_blocks, superblock.uuid), (blocks as u64, uuid_bytes));

        // And as one file, as the root artifact is: veritysetup verifies what this crate wrote.
        let artifact = folder.join("artifact");
        std::fs::write(&artifact, [data, tree.hash_area].concat()).unwrap();
        let artifact = artifact.to_str().unwrap();
        let offset = format!("--hash-offset={}", blocks * BLOCK);
        run("veritysetup", &["verify", &offset, artifact, artifact, root_hash]).unwrap();
    }
}

#[test]
fn openssl_reads_the_machines_certificate_and_key() {
    let folder = folder("certificate");
    let signer = Signer::from_seed(&[42; 32]);
    let certificate = folder.join("machine.der");
    std::fs::write(&certificate, self_signed_certificate(&signer)).unwrap();
    let path = certificate.to_str().unwrap();
    let arguments = ["x509", "-inform", "DER", "-in", path, "-noout", "-text", "-nameopt", "RFC2253"];
    let Some(text) = run("openssl", &arguments) else { return };
    for expected in [
        "Version: 3",
        "Issuer: CN=kiln-machine",
        "Subject: CN=kiln-machine",
        "ED25519",
        "CA:FALSE",
        "Digital Signature",
        "TLS Web Client Authentication",
        "Not Before: Jan  1 00:00:00 2020 GMT",
        "Not After : Dec 31 23:59:59 9999 GMT",
    ] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
    let pem = folder.join("machine.pem");
    run("openssl", &["x509", "-inform", "DER", "-in", path, "-out", pem.to_str().unwrap()]).unwrap();
    let pem = pem.to_str().unwrap();
    run("openssl", &["verify", "-check_ss_sig", "-CAfile", pem, "-partial_chain", pem]).unwrap();

    let key = folder.join("machine.key");
    std::fs::write(&key, signer.pkcs8_pem()).unwrap();
    let public = run("openssl", &["pkey", "-in", key.to_str().unwrap(), "-pubout", "-outform", "PEM"]).unwrap();
    assert_eq!(public, run("openssl", &["x509", "-in", pem, "-noout", "-pubkey"]).unwrap());

    // The other way round: a key and a certificate that openssl makes.
    let (own_key, own_certificate) = (folder.join("own.key"), folder.join("own.der"));
    let (own_key, own_certificate) = (own_key.to_str().unwrap(), own_certificate.to_str().unwrap());
    run("openssl", &["genpkey", "-algorithm", "ed25519", "-out", own_key]).unwrap();
    let subject = ["-subj", "/CN=other", "-days", "1", "-outform", "DER", "-out", own_certificate];
    run("openssl", &[&["req", "-x509", "-key", own_key][..], &subject].concat()).unwrap();
    let own = Signer::from_pkcs8_pem(&std::fs::read_to_string(own_key).unwrap()).unwrap();
    let id = certificate_key_id(&std::fs::read(own_certificate).unwrap()).unwrap();
    assert_eq!(id, spki_key_id(&spki_der(&own)));
}

#[test]
fn rustls_shows_possession_with_it() {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
    use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
    use std::sync::Arc;

    /// Takes any certificate, as the boot server does, and leaves possession to the handshake's signature.
    #[derive(Debug)]
    struct AnyKey(rustls::crypto::WebPkiSupportedAlgorithms);
    type Signed = Result<HandshakeSignatureValid, Error>;
    macro_rules! signatures {
        () => {
            fn verify_tls12_signature(&self, m: &[u8], c: &CertificateDer<'_>, d: &DigitallySignedStruct) -> Signed {
                rustls::crypto::verify_tls12_signature(m, c, d, &self.0)
            }
            fn verify_tls13_signature(&self, m: &[u8], c: &CertificateDer<'_>, d: &DigitallySignedStruct) -> Signed {
                rustls::crypto::verify_tls13_signature(m, c, d, &self.0)
            }
            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                self.0.supported_schemes()
            }
        };
    }
    impl ClientCertVerifier for AnyKey {
        fn root_hint_subjects(&self) -> &[DistinguishedName] {
            &[]
        }
        fn verify_client_cert(
            &self,
            certificate: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: UnixTime,
        ) -> Result<ClientCertVerified, Error> {
            certificate_key_id(certificate).map_err(|e| Error::General(e.to_string()))?;
            Ok(ClientCertVerified::assertion())
        }
        signatures!();
    }
    impl ServerCertVerifier for AnyKey {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        signatures!();
    }

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    // `imposter`: the certificate of one machine with the key of another.
    let handshake = |imposter: bool| -> Result<String, Error> {
        let (machine, other, server) =
            (Signer::from_seed(&[1; 32]), Signer::from_seed(&[2; 32]), Signer::from_seed(&[3; 32]));
        let certificate = |signer: &Signer| vec![CertificateDer::from(self_signed_certificate(signer))];
        let key = |signer: &Signer| PrivateKeyDer::Pkcs8(signer.pkcs8_der().into());
        let server_config = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(AnyKey(algorithms)))
            .with_single_cert(certificate(&server), key(&server))?;
        let client_key = if imposter { &other } else { &machine };
        let signing = provider.key_provider.load_private_key(key(client_key))?;
        let certified = rustls::sign::CertifiedKey::new(certificate(&machine), signing);
        let client_config = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyKey(algorithms)))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
        let mut client =
            rustls::ClientConnection::new(Arc::new(client_config), ServerName::try_from("kiln-agent-api").unwrap())?;
        let mut server = rustls::ServerConnection::new(Arc::new(server_config))?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(certificate_key_id(&server.peer_certificates().unwrap()[0]).unwrap())
    };
    assert_eq!(handshake(false).unwrap(), spki_key_id(&spki_der(&Signer::from_seed(&[1; 32]))));
    assert!(handshake(true).is_err());
}

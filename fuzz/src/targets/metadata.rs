//! What lies under TUF: canonical JSON, signed envelopes, and the chain of roots.

/// Canonical JSON and the strict reader.
pub mod canonical_json {
    use kiln_release::canonical::{canonical, parse_strict};
    use serde_json::Value;

    fn has_control(value: &Value) -> bool {
        let control = |text: &str| text.chars().any(|c| u32::from(c) < 0x20);
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => false,
            Value::String(text) => control(text),
            Value::Array(items) => items.iter().any(has_control),
            Value::Object(map) => map.iter().any(|(key, item)| control(key) || has_control(item)),
        }
    }

    pub fn run(data: &[u8]) {
        let Ok(value) = parse_strict(data) else { return };
        let plain: Value = serde_json::from_slice(data).expect("what the strict reader takes is JSON");
        assert_eq!(plain, value, "the strict reader reads another value");
        let bytes = canonical(&value).expect("the strict reader lets no float in");
        let pretty = serde_json::to_vec_pretty(&value).expect("it is JSON");
        let again = parse_strict(&pretty).expect("white space makes no difference");
        assert_eq!(canonical(&again).expect("no float"), bytes, "white space changed what is signed");
        // OLPC's form leaves control characters as they are, which JSON does not allow.
        if !has_control(&value) {
            let again = parse_strict(&bytes).expect("the canonical form is JSON");
            assert_eq!(again, value);
            assert_eq!(canonical(&again).expect("no float"), bytes, "the canonical form is not its own");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let texts: [&[u8]; 6] = [
            br#"{"b": 1, "a": [true, false, null], "": "", "\"": "\\"}"#,
            br"[-1, 0, 18446744073709551615, -9223372036854775808]",
            r#"{"𐀀": 1, "￿": 2, "x": "\u00e9\n\t"}"#.as_bytes(),
            include_bytes!("../../../images/release/tests/golden/envelope.json"),
            include_bytes!("../../../images/release/tests/golden/manifest.json"),
            br#"{"a":{"a":{"a":{"a":[[[[{}]]]]}}},"b":1.5}"#,
        ];
        texts.map(<[u8]>::to_vec).to_vec()
    }
}

/// Envelopes: outline, and the counting of keys.
pub mod envelope {
    use kiln_release::canonical::{canonical, parse_strict};
    use kiln_release::{EnvelopeError, KeySet, PublicKey, Signer, Unverified, sign_envelope};
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::sync::LazyLock;

    const LIMIT: u64 = 16 << 10;
    const NUMBER: u8 = 4;

    static SIGNERS: LazyLock<Vec<Signer>> =
        LazyLock::new(|| (1..=NUMBER).map(|n| Signer::from_seed(&[n; 32])).collect());

    /// Three keys, the first under two names, so that four key ids are three keys.
    fn keys(threshold: u32) -> KeySet {
        let mut keys: BTreeMap<String, PublicKey> =
            SIGNERS[..3].iter().map(|signer| (signer.public().id(), signer.public())).collect();
        keys.insert("another name".to_owned(), SIGNERS[0].public());
        KeySet::new(keys, threshold)
    }

    fn parse(data: &[u8]) -> Result<Unverified<Value>, EnvelopeError> {
        Unverified::parse(data, LIMIT)
    }

    pub fn run(data: &[u8]) {
        let envelope = match parse(data) {
            Ok(envelope) => envelope,
            Err(error) => {
                let long = data.len() as u64 > LIMIT;
                assert_eq!(matches!(error, EnvelopeError::TooLong { .. }), long, "{error}");
                return;
            }
        };
        assert!(data.len() as u64 <= LIMIT, "longer than its limit");
        // Independent of what counted: how many of the three keys made one of the signatures.
        let value = parse_strict(data).expect("it was read");
        let message = canonical(&value["signed"]).expect("it was read");
        let signatures = value["signatures"].as_array().expect("it was read");
        let known = |signer: &Signer, id: &str| {
            id == signer.public().id() || (id == "another name" && signer.public() == SIGNERS[0].public())
        };
        let made = |signer: &&Signer| {
            signatures.iter().any(|entry| {
                let text = |name: &str| entry[name].as_str().unwrap_or_default();
                let sig = kiln_release::hex::decode(text("sig")).unwrap_or_default();
                known(signer, text("keyid")) && signer.public().verifies(&message, &sig)
            })
        };
        let number = u32::try_from(SIGNERS[..3].iter().filter(made).count()).expect("at most three");
        let pretty = serde_json::to_vec_pretty(&value).expect("it is JSON");
        for threshold in 1..=3 {
            let verdict = envelope.check(&keys(threshold));
            assert_eq!(verdict.is_ok(), number >= threshold, "{number} keys signed, {threshold} were needed");
            if pretty.len() as u64 <= LIMIT {
                let again = parse(&pretty).expect("white space makes no difference").check(&keys(threshold));
                assert_eq!(again, verdict, "white space changed the verdict");
            }
        }
        if number >= 1 {
            let document = envelope.verify(&keys(1)).expect("one key is enough").into_inner();
            assert_eq!(document, value["signed"], "another document than the one that was signed");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let document = json!({ "_type": "x", "n": [1, -2, "é\n\"\\"], "version": 3 });
        let signed = |signers: &[&Signer]| sign_envelope(&document, signers).expect("it has no float").into_bytes();
        let [a, b, c, d] = [0, 1, 2, 3].map(|n| &SIGNERS[n]);
        let mut twice: Value = serde_json::from_slice(&signed(&[a])).expect("JSON");
        let mut copy = twice["signatures"][0].clone();
        copy["keyid"] = "another name".into();
        twice["signatures"].as_array_mut().expect("a list").push(copy);
        vec![
            signed(&[a]),
            signed(&[a, b]),
            signed(&[a, b, c]),
            signed(&[d]),
            signed(&[]),
            twice.to_string().into_bytes(),
        ]
    }
}

/// The chain of roots against a model of it that knows only sets of keys.
pub mod root_chain {
    use jiff::Timestamp;
    use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Request, RoleKeys, Root, RootRoles, Seen};
    use kiln_release::{PublicKey, Signer, sign_envelope};
    use std::collections::BTreeSet;
    use std::sync::LazyLock;

    const KEYS: usize = 5;
    /// Bytes that describe one root: version step and threshold, its keys, its signers, oddities.
    const STEP: usize = 4;
    const STEPS: usize = 8;

    static SIGNERS: LazyLock<Vec<Signer>> =
        LazyLock::new(|| (10..10 + KEYS).map(|n| Signer::from_seed(&[u8::try_from(n).expect("small"); 32])).collect());

    /// What one root says, as the model sees it.
    struct Step {
        version: u64,
        keys: BTreeSet<usize>,
        threshold: u32,
        signers: BTreeSet<usize>,
        expired: bool,
    }

    fn set(bits: u8) -> BTreeSet<usize> {
        (0..KEYS).filter(|n| bits >> n & 1 == 1).collect()
    }

    fn day(n: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + n * 86_400).expect("a time of this century")
    }

    fn bytes(step: &Step, alias: bool) -> Vec<u8> {
        let public = |keys: &BTreeSet<usize>| keys.iter().map(|n| SIGNERS[*n].public()).collect::<Vec<PublicKey>>();
        let other = RoleKeys::new(&[SIGNERS[0].public()], 1);
        let mut role = RoleKeys::new(&public(&step.keys), step.threshold);
        let first = step.keys.first().copied();
        if let (true, Some(_)) = (alias, first) {
            role.keyids.push("alias".to_owned());
        }
        let roles = RootRoles { root: role, timestamp: other.clone(), snapshot: other.clone(), targets: other };
        let mut all = public(&step.keys);
        all.push(SIGNERS[0].public());
        let expires = if step.expired { day(-1) } else { day(30) };
        let mut root = Root::new(step.version, expires, &all, roles);
        let signers: Vec<&Signer> = step.signers.iter().map(|n| &SIGNERS[*n]).collect();
        if let (true, Some(first)) = (alias, first) {
            root.keys.insert("alias".to_owned(), SIGNERS[first].public().to_object());
        }
        let text = sign_envelope(&root, &signers).expect("a root has no float");
        let Some(first) = first.filter(|first| alias && step.signers.contains(first)) else { return text.into_bytes() };
        // The same key signs under its other name, too.
        let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let id = SIGNERS[first].public().id();
        let list = value["signatures"].as_array_mut().expect("a list");
        let mut copy = list.iter().find(|entry| entry["keyid"] == id).expect("it signed").clone();
        copy["keyid"] = "alias".into();
        list.push(copy);
        value.to_string().into_bytes()
    }

    fn reaches(signers: &BTreeSet<usize>, keys: &BTreeSet<usize>, threshold: u32) -> bool {
        threshold > 0 && signers.intersection(keys).count() >= threshold as usize
    }

    pub fn run(data: &[u8]) {
        let first = Step { version: 1, keys: set(0b11), threshold: 1, signers: set(0b11), expired: false };
        let trusted = bytes(&first, false);
        let (mut current, mut model) = (first, Ok(1));
        let mut files = Vec::new();
        for raw in data.chunks_exact(STEP).take(STEPS) {
            let [number, keys, signers, odd] = [raw[0], raw[1], raw[2], raw[3]];
            let version = match number >> 4 {
                14 => current.version,
                15 => current.version + 2,
                _ => current.version + 1,
            };
            let threshold = u32::from(number & 7);
            let step = Step { version, keys: set(keys), threshold, signers: set(signers), expired: odd & 1 == 1 };
            files.push(bytes(&step, odd & 2 == 2));
            let good = version == current.version + 1
                && reaches(&step.signers, &current.keys, current.threshold)
                && reaches(&step.signers, &step.keys, step.threshold);
            if !good {
                model = Err(());
                break;
            }
            model = Ok(version);
            current = step;
        }
        let model = model.and_then(|version| if current.expired { Err(()) } else { Ok(version) });

        let seen = Seen::default();
        let now = day(0);
        let mut client = Client::new(&trusted, seen, now, Limits::default(), ExpiryPolicy::Refuse, Vec::new())
            .expect("the first root is good");
        let mut files = files.into_iter();
        let mut verdict = Ok(());
        while let Request::Fetch { path, may_be_absent, .. } = client.next() {
            if !may_be_absent {
                break;
            }
            assert!(path.ends_with(".root.json"), "{path}");
            let fetched = files.next().map_or(Fetched::Absent, Fetched::Bytes);
            verdict = client.feed(fetched);
            if verdict.is_err() {
                break;
            }
        }
        match (&verdict, model) {
            (Ok(()), Ok(version)) => assert_eq!(client.root().version, version),
            (Err(_), Err(())) => {}
            (Ok(()), Err(())) => panic!("the client took a chain that the model refuses"),
            (Err(error), Ok(_)) => panic!("the client refused a chain that the model takes: {error}"),
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        vec![
            vec![1, 0b11, 0b11, 0],
            vec![2, 0b110, 0b111, 0, 1, 0b1000, 0b1110, 0],
            vec![1, 0b1, 0b1, 2, 2, 0b11, 0b11, 2],
            vec![1, 0b1, 0b1, 1, 1, 0b1, 0b1, 0],
            vec![0xf1, 0b11, 0b11, 0],
            [[1, 0b11, 0b11, 0]; STEPS].concat(),
        ]
    }
}

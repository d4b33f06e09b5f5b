//! OLPC canonical JSON: the bytes that are signed and hashed, as the TUF reference implementation
//! (securesystemslib) makes them. Also the strict reader for signed documents.
//!
//! Keys sorted by code point, no white space, strings escape only `"` and `\`, integers only. Two readers must
//! never see different documents in the same bytes, so the strict reader refuses what JSON leaves open: a key
//! given twice, and floating-point numbers (which includes integers beyond 64 bits).

use crate::error::CanonicalError;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::Serialize;
use serde_json::{Map, Value};
use std::fmt;

/// The canonical bytes of a JSON value.
pub fn canonical(value: &Value) -> Result<Vec<u8>, CanonicalError> {
    let mut out = Vec::new();
    write(value, &mut out)?;
    Ok(out)
}

/// The canonical bytes of anything serde can turn into JSON.
pub fn canonical_of<T: Serialize>(value: &T) -> Result<Vec<u8>, CanonicalError> {
    canonical(&serde_json::to_value(value).map_err(|e| CanonicalError::NotJson { reason: e.to_string() })?)
}

fn write(value: &Value, out: &mut Vec<u8>) -> Result<(), CanonicalError> {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => {
            if number.is_f64() {
                return Err(CanonicalError::Float { got: number.to_string() });
            }
            out.extend_from_slice(number.to_string().as_bytes());
        }
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write(item, out)?;
            }
            out.push(b']');
        }
        Value::Object(map) => {
            // Sorted here and not left to the map: another crate may switch serde_json to insertion order.
            // Byte order of UTF-8 is code point order.
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            out.push(b'{');
            for (i, (key, item)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_string(key, out);
                out.push(b':');
                write(item, out)?;
            }
            out.push(b'}');
        }
    }
    Ok(())
}

fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in text.bytes() {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out.push(b'"');
}

/// Reads JSON and refuses keys given twice and floating-point numbers, at any depth.
pub fn parse_strict(bytes: &[u8]) -> Result<Value, CanonicalError> {
    serde_json::from_slice::<Strict>(bytes)
        .map(|strict| strict.0)
        .map_err(|e| CanonicalError::NotJson { reason: e.to_string() })
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without floating-point numbers and without keys given twice")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Err(E::custom(format_args!("floating-point number {v}")))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((key, Strict(item))) = access.next_entry::<String, Strict>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("key {key:?} given twice")));
            }
            map.insert(key, item);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn examples_as_securesystemslib_encodes_them() {
        for (value, expected) in [
            (json!({"b": 1, "a": [true, false, null]}), r#"{"a":[true,false,null],"b":1}"#),
            (json!({"": "", "\"": "\\"}), "{\"\":\"\",\"\\\"\":\"\\\\\"}"),
            (json!("a\nb\tc\u{7f}é\u{1F600}"), "\"a\nb\tc\u{7f}é\u{1F600}\""),
            (json!([-1, 0, u64::MAX, i64::MIN]), "[-1,0,18446744073709551615,-9223372036854775808]"),
            // Code point order, not UTF-16 order: U+FFFF sorts before U+10000.
            (json!({"\u{10000}": 1, "\u{ffff}": 2}), "{\"\u{ffff}\":2,\"\u{10000}\":1}"),
        ] {
            assert_eq!(String::from_utf8(canonical(&value).unwrap()).unwrap(), expected);
        }
    }

    #[test]
    fn floats_are_refused() {
        assert!(matches!(canonical(&json!({"a": 1.5})), Err(CanonicalError::Float { .. })));
        for text in ["1.0", "1e3", "-0", "[18446744073709551616]"] {
            assert!(matches!(parse_strict(text.as_bytes()), Err(CanonicalError::NotJson { .. })), "{text}");
        }
    }

    #[test]
    fn a_key_given_twice_is_refused_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"x":{"a":1,"b":2,"a":3}}]"#, r#"{"a":1,"\u0061":2}"#] {
            let error = parse_strict(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("given twice"), "{error}");
        }
    }

    #[test]
    fn trailing_bytes_and_deep_nesting_are_refused() {
        assert!(parse_strict(b"{} {}").is_err());
        assert!(parse_strict("[".repeat(100_000).as_bytes()).is_err());
    }

    pub(crate) fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn strict_reader_agrees_with_serde_json(value in any_value()) {
            let text = serde_json::to_vec(&value).unwrap();
            prop_assert_eq!(parse_strict(&text).unwrap(), value);
        }

        #[test]
        fn different_values_have_different_bytes(a in any_value(), b in any_value()) {
            prop_assert_eq!(canonical(&a).unwrap() == canonical(&b).unwrap(), a == b);
        }

        #[test]
        fn white_space_and_key_order_do_not_matter(value in any_value()) {
            let pretty = serde_json::to_vec_pretty(&value).unwrap();
            prop_assert_eq!(canonical(&parse_strict(&pretty).unwrap()).unwrap(), canonical(&value).unwrap());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_strict(&bytes);
        }
    }
}

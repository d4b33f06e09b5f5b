//! Mutations of inputs, the same for the same seed: what libFuzzer does, in the small, for an ordinary test.

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// From 0 to below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).expect("less than a usize")
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// Bytes that often lie at an edge.
const BYTES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\\', b'{', b'0', b'9', b'-', b'\n'];
/// Words that readers of text tell apart.
const WORDS: [&str; 18] = [
    "null",
    "true",
    "{}",
    "[]",
    "-1",
    "0",
    "18446744073709551615",
    "1.0",
    "1e9",
    "\"\"",
    "..",
    "/",
    "\\u0000",
    "\u{202e}",
    "sha256",
    "\r\n",
    "=",
    "\0",
];
/// Longest input that is made.
const LONGEST: usize = 32 << 10;

/// Changes `input` in one to six places. `others` lend their bytes.
pub fn mutate(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>]) {
    for _ in 0..=random.below(6) {
        change(random, input, others);
    }
    input.truncate(LONGEST);
}

fn change(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>]) {
    let at = random.below(input.len() + 1);
    let most = random.below(40);
    let length = random.below(1 + most).min(input.len() - at);
    match random.below(12) {
        0 | 1 => with(input, at, |byte| *byte ^= 1 << random.below(8)),
        2 => with(input, at, |byte| *byte = random.byte()),
        3 => with(input, at, |byte| *byte = BYTES[random.below(BYTES.len())]),
        4 => with(input, at, |byte| *byte = byte.wrapping_add(1 + random.byte() % 16).wrapping_sub(8)),
        5 => {
            input.drain(at..at + length);
        }
        6 => {
            let piece = input[at..at + length].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, piece);
        }
        7 => {
            let word = WORDS[random.below(WORDS.len())];
            input.splice(at..at + length, word.bytes());
        }
        8 => {
            let bytes: Vec<u8> = (0..random.below(8)).map(|_| random.byte()).collect();
            input.splice(at..at, bytes);
        }
        9 => number(random, input, at),
        10 => {
            let other = &others[random.below(others.len())];
            let from = random.below(other.len() + 1);
            let end = (from + random.below(60)).min(other.len());
            input.splice(at..at + length, other[from..end].iter().copied());
        }
        _ => input.truncate(at.max(1)),
    }
}

fn with(input: &mut [u8], at: usize, change: impl FnOnce(&mut u8)) {
    if let Some(byte) = input.get_mut(at) {
        change(byte);
    }
}

/// The next decimal number becomes another one.
fn number(random: &mut Random, input: &mut Vec<u8>, at: usize) {
    let Some(begin) = input[at..].iter().position(u8::is_ascii_digit).map(|n| at + n) else { return };
    let end = begin + input[begin..].iter().take_while(|b| b.is_ascii_digit()).count();
    let text = match random.below(5) {
        0 => "0".to_owned(),
        1 => u64::MAX.to_string(),
        2 => (u128::from(u64::MAX) + 1).to_string(),
        3 => (random.next() >> random.below(64)).to_string(),
        _ => random.below(4).to_string(),
    };
    input.splice(begin..end, text.into_bytes());
}

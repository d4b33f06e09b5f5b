//! QR codes (ISO/IEC 18004): byte mode, versions 1 to 6, error correction L, or M where it costs no larger version.
//! Enough for a URL on a screen of 25 lines; no other modes, and no reader. Pure.

/// Codewords in all of versions 1 to 6.
const TOTAL: [usize; 6] = [26, 44, 70, 100, 134, 172];
/// Error correction codewords of a block, and blocks, by version: L, then M. Blocks of a symbol are equally long here.
const LOW: [(usize, usize); 6] = [(7, 1), (10, 1), (15, 1), (20, 1), (26, 1), (18, 2)];
const MEDIUM: [(usize, usize); 6] = [(10, 1), (16, 1), (26, 1), (18, 2), (24, 2), (16, 4)];
/// The levels' bits in the format information.
const LOW_BITS: u32 = 0b01;
const MEDIUM_BITS: u32 = 0b00;

/// A symbol: dark and light modules.
#[derive(Clone, PartialEq, Eq)]
pub struct Qr {
    pub size: usize,
    dark: Vec<bool>,
    /// Patterns and format information, which no mask touches.
    fixed: Vec<bool>,
}

/// The symbol of some text; none if it does not fit version 6.
pub fn encode(text: &str) -> Option<Qr> {
    let data = text.as_bytes();
    // Mode and length take 12 bits: of the data codewords two are not whole.
    let fits = |version: usize, (correction, blocks): (usize, usize)| {
        data.len() + 2 <= TOTAL[version - 1] - correction * blocks
    };
    let version = (1..=6).find(|version| fits(*version, LOW[version - 1]))?;
    let medium = fits(version, MEDIUM[version - 1]);
    let (level, bits) = if medium { (MEDIUM[version - 1], MEDIUM_BITS) } else { (LOW[version - 1], LOW_BITS) };
    let codewords = codewords(data, TOTAL[version - 1], level);
    let mut blank = Qr::blank(version);
    blank.place(&codewords);
    (0..8)
        .map(|mask| {
            let mut qr = blank.clone();
            qr.mask(mask);
            qr.format(bits << 3 | mask);
            qr
        })
        .min_by_key(Qr::penalty)
}

/// Data and error correction, in the order in which they are placed (7.4 to 7.6).
fn codewords(data: &[u8], total: usize, (correction, blocks): (usize, usize)) -> Vec<u8> {
    let capacity = total - correction * blocks;
    let mut bits = Bits::default();
    bits.push(0b0100, 4);
    bits.push(data.len(), 8);
    for byte in data {
        bits.push(usize::from(*byte), 8);
    }
    // The terminator, and what fills the last byte, are the zeros that are there.
    let mut bytes = bits.bytes;
    for pad in [0xec, 0x11].into_iter().cycle().take(capacity - bytes.len()) {
        bytes.push(pad);
    }
    let divisor = divisor(correction);
    let length = capacity / blocks;
    let parts: Vec<(&[u8], Vec<u8>)> = bytes.chunks(length).map(|block| (block, remainder(block, &divisor))).collect();
    let data = (0..length).flat_map(|i| parts.iter().map(move |(block, _)| block[i]));
    let more = (0..correction).flat_map(|i| parts.iter().map(move |(_, rest)| rest[i]));
    data.chain(more).collect()
}

#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    fn push(&mut self, value: usize, count: usize) {
        for n in (0..count).rev() {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if value >> n & 1 == 1 {
                self.bytes[self.used / 8] |= 0x80 >> (self.used % 8);
            }
            self.used += 1;
        }
    }
}

/// The product in GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1.
fn product(x: u8, y: u8) -> u8 {
    (0..8).rev().fold(0_u8, |z, n| {
        let doubled = (z << 1) ^ if z & 0x80 == 0 { 0 } else { 0x1d };
        doubled ^ if y >> n & 1 == 1 { x } else { 0 }
    })
}

/// The generator polynomial of a degree, without its leading one, highest power first.
fn divisor(degree: usize) -> Vec<u8> {
    let mut result = vec![0; degree];
    result[degree - 1] = 1;
    let mut root = 1;
    for _ in 0..degree {
        for j in 0..degree {
            result[j] = product(result[j], root) ^ result.get(j + 1).copied().unwrap_or(0);
        }
        root = product(root, 2);
    }
    result
}

fn remainder(data: &[u8], divisor: &[u8]) -> Vec<u8> {
    let mut result = vec![0; divisor.len()];
    for byte in data {
        let factor = byte ^ result.remove(0);
        result.push(0);
        result.iter_mut().zip(divisor).for_each(|(r, d)| *r ^= product(*d, factor));
    }
    result
}

impl Qr {
    /// Finder, timing and alignment patterns; the format's place is taken.
    fn blank(version: usize) -> Self {
        let size = 17 + 4 * version;
        let mut qr = Self { size, dark: vec![false; size * size], fixed: vec![false; size * size] };
        for i in 0..size {
            qr.fix(6, i, i % 2 == 0);
            qr.fix(i, 6, i % 2 == 0);
        }
        for (cx, cy) in [(3, 3), (size - 4, 3), (3, size - 4)] {
            // One ring more than the finder: the light separator, where it lies inside.
            for y in cy.saturating_sub(4)..=(cy + 4).min(size - 1) {
                for x in cx.saturating_sub(4)..=(cx + 4).min(size - 1) {
                    let distance = x.abs_diff(cx).max(y.abs_diff(cy));
                    qr.fix(x, y, distance != 2 && distance != 4);
                }
            }
        }
        if version > 1 {
            let centre = size - 7;
            for y in centre - 2..=centre + 2 {
                for x in centre - 2..=centre + 2 {
                    qr.fix(x, y, x.abs_diff(centre).max(y.abs_diff(centre)) != 1);
                }
            }
        }
        qr.format(0);
        qr
    }

    fn fix(&mut self, x: usize, y: usize, dark: bool) {
        self.dark[y * self.size + x] = dark;
        self.fixed[y * self.size + x] = true;
    }

    /// Both copies of the format information (7.9), and the one module that is always dark.
    fn format(&mut self, data: u32) {
        let rest = (0..10).fold(data, |rest, _| (rest << 1) ^ ((rest >> 9) * 0x537));
        let bits = (data << 10 | rest) ^ 0x5412;
        let (size, bit) = (self.size, |n: usize| bits >> n & 1 == 1);
        for n in 0..15 {
            let (x, y) = match n {
                0..=5 => (8, n),
                6 => (8, 7),
                7 => (8, 8),
                8 => (7, 8),
                _ => (14 - n, 8),
            };
            self.fix(x, y, bit(n));
            let (x, y) = if n < 8 { (size - 1 - n, 8) } else { (8, size - 15 + n) };
            self.fix(x, y, bit(n));
        }
        self.fix(8, size - 8, true);
    }

    /// In columns of two from the right, up and down, around what is fixed (7.7.3).
    fn place(&mut self, codewords: &[u8]) {
        let mut bits = codewords.iter().flat_map(|byte| (0..8).rev().map(move |n| byte >> n & 1 == 1));
        // The timing pattern's column is passed over.
        let columns = (7..self.size).rev().step_by(2).chain([5, 3, 1]);
        for (turn, right) in columns.enumerate() {
            for step in 0..self.size {
                let y = if turn % 2 == 0 { self.size - 1 - step } else { step };
                for x in [right, right - 1] {
                    if !self.fixed[y * self.size + x] {
                        self.dark[y * self.size + x] = bits.next().unwrap_or(false);
                    }
                }
            }
        }
    }

    fn mask(&mut self, mask: u32) {
        for y in 0..self.size {
            for x in 0..self.size {
                let flip = match mask {
                    0 => (x + y) % 2 == 0,
                    1 => y % 2 == 0,
                    2 => x % 3 == 0,
                    3 => (x + y) % 3 == 0,
                    4 => (x / 3 + y / 2) % 2 == 0,
                    5 => x * y % 2 + x * y % 3 == 0,
                    6 => (x * y % 2 + x * y % 3) % 2 == 0,
                    _ => ((x + y) % 2 + x * y % 3) % 2 == 0,
                };
                let at = y * self.size + x;
                self.dark[at] ^= flip && !self.fixed[at];
            }
        }
    }

    /// How hard it is to read (7.8.3): the four rules' points.
    fn penalty(&self) -> usize {
        let size = self.size;
        let mut points = 0;
        for i in 0..size {
            for line in [0, 1] {
                let at = |j: usize| if line == 0 { self.is_dark(j, i) } else { self.is_dark(i, j) };
                let (mut run, mut window) = (0, 0_u32);
                for j in 0..size {
                    run = if j > 0 && at(j) == at(j - 1) { run + 1 } else { 1 };
                    points += if run == 5 { 3 } else { usize::from(run > 5) };
                    window = (window << 1 | u32::from(at(j))) & 0x7ff;
                    if j >= 10 && (window == 0b101_1101_0000 || window == 0b000_0101_1101) {
                        points += 40;
                    }
                }
            }
        }
        for y in 1..size {
            for x in 1..size {
                let here = self.is_dark(x, y);
                let same = |x, y| self.is_dark(x, y) == here;
                points += if same(x - 1, y) && same(x, y - 1) && same(x - 1, y - 1) { 3 } else { 0 };
            }
        }
        let dark = self.dark.iter().filter(|d| **d).count();
        points + (dark * 20).abs_diff(size * size * 10) / (size * size) * 10
    }

    /// Outside it is light: the quiet zone.
    fn is_dark(&self, x: usize, y: usize) -> bool {
        x < self.size && y < self.size && self.dark[y * self.size + x]
    }

    /// Rows of modules with a quiet zone, light ones true: on a screen that is dark they are what is drawn.
    fn light(&self, quiet: usize) -> Vec<Vec<bool>> {
        let shifted = |n: usize| n.checked_sub(quiet).unwrap_or(usize::MAX);
        let width = self.size + 2 * quiet;
        let row = |y: usize| (0..width).map(|x| !self.is_dark(shifted(x), shifted(y))).collect();
        (0..width).map(row).collect()
    }

    /// Two modules over each other are one character: for a text screen, whose characters are twice as high as wide.
    pub fn half_blocks(&self, quiet: usize) -> Vec<String> {
        let rows = self.light(quiet);
        let dark = vec![false; rows.len()];
        let pair = |pair: &[Vec<bool>]| {
            let lower = pair.get(1).unwrap_or(&dark);
            let characters = pair[0].iter().zip(lower).map(|halves| match halves {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
            characters.collect()
        };
        rows.chunks(2).map(pair).collect()
    }

    /// Two characters for each module: for a line of text that goes anywhere.
    pub fn blocks(&self, quiet: usize) -> Vec<String> {
        let row = |row: &Vec<bool>| row.iter().map(|light| if *light { "██" } else { "  " }).collect();
        self.light(quiet).iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What zbar reads in an image of these rows of light modules.
    fn read(rows: &[Vec<bool>]) -> Option<String> {
        let scale = 4;
        let (width, mut image) = (rows.len() * scale, Vec::new());
        for row in rows {
            let line: String = row.iter().map(|light| if *light { "0 0 0 0 " } else { "1 1 1 1 " }).collect();
            image.extend(std::iter::repeat_n(line, scale));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qr.pbm");
        std::fs::write(&path, format!("P1\n{width} {width}\n{}\n", image.join("\n"))).unwrap();
        let out = Command::new("zbarimg").args(["-q", "--raw"]).arg(&path).output();
        let Ok(out) = out else {
            let why = "zbarimg is not installed (Debian's zbar-tools); `make setup` installs it";
            crate::testing::oracle::skipped(why);
            return None;
        };
        Some(String::from_utf8(out.stdout).unwrap().trim_end_matches('\n').to_owned())
    }

    #[test]
    fn another_program_reads_every_version_at_both_levels() {
        let mut seen = std::collections::BTreeSet::new();
        // The longest and shortest text of each version at both levels: 14, 17, 26, 32, 42, 53, 62, 78, 84, 106, 134.
        for length in [1, 14, 15, 17, 18, 26, 27, 32, 33, 42, 43, 53, 54, 62, 63, 78, 79, 84, 85, 106, 107, 134] {
            let text: String = "http://10.77.0.1:8080/m/".chars().chain(('a'..='z').cycle()).take(length).collect();
            let qr = encode(&text).unwrap();
            seen.insert(qr.size);
            match read(&qr.light(4)) {
                Some(got) => assert_eq!(got, text, "length {length}, {} modules", qr.size),
                None => return,
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [21, 25, 29, 33, 37, 41]);
        assert!(encode(&"x".repeat(135)).is_none());
    }

    #[test]
    fn a_damaged_symbol_is_still_read() {
        let text = "http://10.77.0.1:8080/m/rack-1";
        let mut rows = encode(text).unwrap().light(4);
        // A few modules in the middle of the data: the error correction is right, or nobody reads this.
        for (x, y) in [(16, 16), (17, 16), (16, 17), (17, 17)] {
            rows[y][x] = !rows[y][x];
        }
        if let Some(got) = read(&rows) {
            assert_eq!(got, text);
        }
    }

    #[test]
    fn characters_are_the_modules() {
        let qr = encode("kiln").unwrap();
        let (light, half, whole) = (qr.light(2), qr.half_blocks(2), qr.blocks(2));
        assert_eq!((half.len(), whole.len(), qr.size), (13, 25, 21));
        for (y, row) in light.iter().enumerate() {
            for (x, light) in row.iter().enumerate() {
                let both = half[y / 2].chars().nth(x).unwrap();
                let drawn = if y % 2 == 0 { matches!(both, '█' | '▀') } else { matches!(both, '█' | '▄') };
                assert_eq!((drawn, whole[y].chars().nth(2 * x) == Some('█')), (*light, *light), "{x}, {y}");
            }
        }
    }
}

//! Big-endian numbers and sized buffers (TPM 2.0 part 2, §5 and `TPM2B_*`).

use super::TpmError;

/// Builds a structure.
#[derive(Debug, Default, Clone)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `TPM2B`: the length in two bytes, then the content.
    pub(super) fn sized(self, bytes: &[u8]) -> Self {
        let length = u16::try_from(bytes.len()).expect("a TPM takes no command of 64 KiB, and none is built");
        self.u16(length).bytes(bytes)
    }
}

/// Takes a structure apart; every step is checked against what is left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], TpmError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(TpmError::Short { what })?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], TpmError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(TpmError::Short { what })?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, TpmError> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, TpmError> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, TpmError> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, TpmError> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// The content of a `TPM2B`.
    pub(super) fn sized(&mut self, what: &'static str) -> Result<&'a [u8], TpmError> {
        let length = self.u16(what)?;
        self.take(usize::from(length), what)
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), TpmError> {
        if self.0.is_empty() { Ok(()) } else { Err(TpmError::Surplus(self.0.len())) }
    }
}

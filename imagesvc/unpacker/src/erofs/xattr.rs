//! Extended attributes in the form EROFS keeps beside an inode.

use super::MAX_NAME_LEN;

/// Name prefixes that EROFS stores as a number (EROFS_XATTR_INDEX_*).
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
/// POSIX ACLs: the number stands for the whole name.
const WHOLE_NAMES: [(&[u8], u8); 2] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
];

/// Largest value, by the 16 bits of `e_value_size`.
const MAX_VALUE_LEN: usize = u16::MAX as usize;
/// All of one inode's names and values: Linux lists no more (XATTR_LIST_MAX),
/// and it keeps `i_xattr_icount` far from its 16 bits.
const MAX_TOTAL_LEN: usize = 64 * 1024;

const HEADER_LEN: usize = 12;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    #[error("its name is empty, longer than {MAX_NAME_LEN} bytes or has a NUL in it")]
    BadName,
    #[error("its value has {0} bytes, more than {MAX_VALUE_LEN}")]
    ValueTooLong(usize),
    #[error("the attributes of one file take more than {MAX_TOTAL_LEN} bytes")]
    TooMany,
}

/// The extended attributes of an inode, encoded. The order of insertion is
/// the order in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xattrs {
    entries: Vec<u8>,
}

impl Xattrs {
    /// Adds `name`, which the caller knows is not yet there. False: EROFS has
    /// no place for this namespace, and nothing was added.
    pub fn push(&mut self, name: &[u8], value: &[u8]) -> Result<bool, XattrError> {
        if name.is_empty() || name.len() > MAX_NAME_LEN || name.contains(&0) {
            return Err(XattrError::BadName);
        }
        if value.len() > MAX_VALUE_LEN {
            return Err(XattrError::ValueTooLong(value.len()));
        }
        let Some((index, suffix)) = split(name) else {
            return Ok(false);
        };
        if suffix.is_empty() && !WHOLE_NAMES.iter().any(|(whole, _)| *whole == name) {
            return Err(XattrError::BadName);
        }
        let len = (4 + suffix.len() + value.len()).next_multiple_of(4);
        if self.entries.len() + len > MAX_TOTAL_LEN {
            return Err(XattrError::TooMany);
        }
        // Both fit: checked above.
        self.entries.extend([suffix.len() as u8, index]);
        self.entries.extend((value.len() as u16).to_le_bytes());
        self.entries.extend(suffix);
        self.entries.extend(value);
        self.entries
            .resize(self.entries.len().next_multiple_of(4), 0);
        Ok(true)
    }

    /// Length beside the inode, header included; 0 without attributes.
    pub fn encoded_len(&self) -> usize {
        match self.entries.len() {
            0 => 0,
            len => HEADER_LEN + len,
        }
    }

    /// `i_xattr_icount`: words of 4 bytes, the header counting as one.
    pub(super) fn icount(&self) -> u16 {
        match self.entries.len() {
            0 => 0,
            // At most 64 KiB / 4 + 1.
            len => (len / 4 + 1) as u16,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        if !self.entries.is_empty() {
            out.extend([0; HEADER_LEN]);
            out.extend(&self.entries);
        }
    }

    pub(super) fn memory(&self) -> usize {
        self.entries.capacity()
    }

    pub(super) fn shrink(&mut self) {
        self.entries.shrink_to_fit();
    }
}

/// Length beside an inode whose `i_xattr_icount` is `icount`.
pub(super) fn len_of(icount: usize) -> usize {
    match icount {
        0 => 0,
        words => HEADER_LEN + (words - 1) * 4,
    }
}

/// Whole names and values out of what lies beside an inode; None: malformed.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    let mut rest = bytes.get(HEADER_LEN..).unwrap_or_default();
    while let [suffix_len, index, low, high, entry @ ..] = rest {
        let (suffix_len, value_len) = (
            usize::from(*suffix_len),
            usize::from(u16::from_le_bytes([*low, *high])),
        );
        let prefix = PREFIXES.iter().chain(&WHOLE_NAMES);
        let (prefix, _) = prefix.into_iter().find(|(_, number)| number == index)?;
        let name = [prefix, entry.get(..suffix_len)?].concat();
        let value = entry.get(suffix_len..suffix_len + value_len)?;
        found.push((name, value.to_vec()));
        let len = (4 + suffix_len + value_len).next_multiple_of(4);
        rest = rest.get(len..)?;
    }
    rest.is_empty().then_some(found)
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((_, index)) = WHOLE_NAMES.iter().find(|(whole, _)| *whole == name) {
        return Some((*index, &[]));
    }
    PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_prefix_numbers_and_pads_to_words() {
        let mut xattrs = Xattrs::default();
        assert_eq!(xattrs.icount(), 0);
        assert!(xattrs.push(b"user.a", b"xyz").unwrap());
        assert_eq!(xattrs.entries, [1, 1, 3, 0, b'a', b'x', b'y', b'z']);
        assert!(xattrs.push(b"system.posix_acl_access", b"q").unwrap());
        assert_eq!(xattrs.entries[8..], [0, 2, 1, 0, b'q', 0, 0, 0]);
        assert_eq!(xattrs.encoded_len(), 28);
        assert_eq!(xattrs.icount(), 5);
        assert_eq!(len_of(5), 28);
    }

    #[test]
    fn decodes_what_it_encodes_and_nothing_else() {
        let given: [(&[u8], &[u8]); 3] = [
            (b"user.a", b"xyz"),
            (b"system.posix_acl_access", b""),
            (b"security.capability", &[7; 300]),
        ];
        let mut xattrs = Xattrs::default();
        for (name, value) in given {
            assert!(xattrs.push(name, value).unwrap());
        }
        let mut bytes = Vec::new();
        xattrs.encode(&mut bytes);
        let decoded = decode(&bytes).unwrap();
        let decoded: Vec<(&[u8], &[u8])> = decoded.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        assert_eq!(decoded, given);
        assert_eq!(decode(&[]), Some(Vec::new()));
        assert_eq!(decode(&bytes[..bytes.len() - 4]), None);
        bytes[HEADER_LEN + 1] = 9;
        assert_eq!(decode(&bytes), None);
    }

    #[test]
    fn leaves_out_foreign_namespaces_and_refuses_bad_names() {
        let mut xattrs = Xattrs::default();
        assert!(!xattrs.push(b"com.apple.quarantine", b"1").unwrap());
        assert!(!xattrs.push(b"system.nfs4_acl", b"1").unwrap());
        assert_eq!(xattrs.encoded_len(), 0);
        for name in [&b""[..], b"user.", b"user.a\0b", &[b'u'; 256]] {
            assert_eq!(xattrs.push(name, b""), Err(XattrError::BadName));
        }
        assert_eq!(
            xattrs.push(b"user.a", &[0; 65536]),
            Err(XattrError::ValueTooLong(65536))
        );
        assert!(xattrs.push(b"user.a", &[0; 65000]).unwrap());
        assert_eq!(xattrs.push(b"user.b", &[0; 1000]), Err(XattrError::TooMany));
    }
}

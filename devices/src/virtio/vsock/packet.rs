//! The header of a vsock packet (virtio 1.2 section 5.10.6), between its 44 bytes and a struct.
//!
//! The layout is the virtio-vsock crate's. That crate also takes descriptor chains apart, but only
//! those of one or two descriptors; a driver may cut a packet as it likes (section 2.7.4), so the
//! bytes come through [`Chain`](crate::virtio::Chain) here. Nothing in a header is to be believed.
#![allow(unsafe_code)] // The crate's view of a header that lies in host memory.

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;

/// The CID of the host, as the guest addresses it.
pub(super) const HOST_CID: u64 = 2;

/// The type of a packet of a stream; there is no other type without VIRTIO_VSOCK_F_SEQPACKET.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet is for (section 5.10.6).
pub(super) mod op {
    /// Asks for a connection.
    pub(in super::super) const REQUEST: u16 = 1;
    /// Accepts it.
    pub(in super::super) const RESPONSE: u16 = 2;
    /// Refuses it, or ends it at once.
    pub(in super::super) const RST: u16 = 3;
    /// Says what its sender will not do any more: [`super::shutdown`].
    pub(in super::super) const SHUTDOWN: u16 = 4;
    /// Carries payload.
    pub(in super::super) const RW: u16 = 5;
    /// Tells its sender's credit, as every packet does.
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    /// Asks to be told the credit.
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`].
pub(super) mod shutdown {
    /// Its sender receives no more.
    pub(in super::super) const RECEIVE: u32 = 1;
    /// Its sender sends no more.
    pub(in super::super) const SEND: u32 = 2;
    /// Both.
    pub(in super::super) const BOTH: u32 = RECEIVE | SEND;
}

/// A header, decoded. All numbers are as the guest sees them: what comes from the guest has the guest
/// as its source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender can buffer for this stream.
    pub(super) buf_alloc: u32,
    /// Bytes of this stream that have left that buffer, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Header {
        let mut copy = [0; HEADER_LEN];
        let mut packet = view(&mut copy);
        packet
            .set_header_from_raw(bytes)
            .expect("the lengths are equal");
        Header {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            kind: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        view(&mut bytes)
            .set_src_cid(self.src_cid)
            .set_dst_cid(self.dst_cid)
            .set_src_port(self.src_port)
            .set_dst_port(self.dst_port)
            .set_len(self.len)
            .set_type(self.kind)
            .set_op(self.op)
            .set_flags(self.flags)
            .set_buf_alloc(self.buf_alloc)
            .set_fwd_cnt(self.fwd_cnt);
        bytes
    }

    /// The refusal of this packet, to whoever it says it is from.
    pub(super) fn refusal(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

/// The crate's accessors over a header.
fn view(bytes: &mut [u8; HEADER_LEN]) -> VsockPacket<'_, ()> {
    // SAFETY: the packet borrows `bytes` exclusively for as long as it lives, so nobody else accesses
    // them, and they stay where they are.
    unsafe { VsockPacket::new(bytes, None) }.expect("the length is that of a header")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let mut expected = Vec::new();
        expected.extend(0x0102_0304_0506_0708u64.to_le_bytes());
        expected.extend(0x1112_1314_1516_1718u64.to_le_bytes());
        for word in [0x2122_2324u32, 0x3132_3334, 0x4142_4344] {
            expected.extend(word.to_le_bytes());
        }
        expected.extend(0x5152u16.to_le_bytes());
        expected.extend(0x6162u16.to_le_bytes());
        for word in [0x7172_7374u32, 0x8182_8384, 0x9192_9394] {
            expected.extend(word.to_le_bytes());
        }
        assert_eq!(header.encode().as_slice(), expected);
        assert_eq!(Header::decode(&header.encode()), header);
    }
}

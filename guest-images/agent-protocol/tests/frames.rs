//! Frames: what goes in comes out, and what is no frame is an error, however the stream is cut.

use std::io::{self, Read};

use forkvm_agent_protocol::{
    AgentFrame, Bytes, ClientFrame, Exec, Exit, FRAME_MAX, FrameError, Generation, Hello, Identity,
    Refusal, Request, Size, frame,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Gives `step` bytes at a time.
struct Dribble<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.step.min(buffer.len()).min(self.bytes.len());
        buffer[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Ok(count)
    }
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..300).prop_map(Bytes)
}

fn exec() -> impl Strategy<Value = Exec> {
    let size = (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| Size { rows, columns });
    let parts = (
        vec(bytes(), 0..4),
        vec((bytes(), bytes()), 0..4),
        option::of(bytes()),
        option::of(".{0,9}"),
        option::of(size),
    );
    parts.prop_map(|(argv, env, directory, user, terminal)| Exec {
        argv,
        env,
        directory,
        user,
        terminal,
    })
}

fn client_frame() -> impl Strategy<Value = ClientFrame> {
    let identity = (
        any::<u32>(),
        any::<[u8; 16]>(),
        ".{0,70}",
        bytes(),
        any::<u64>(),
    );
    prop_oneof![
        (".{0,20}", any::<u32>(), any::<u64>()).prop_map(|(magic, version, features)| {
            ClientFrame::Hello(Hello {
                magic,
                version,
                features,
            })
        }),
        exec().prop_map(|exec| ClientFrame::Request(Request::Exec(exec))),
        identity.prop_map(|(clone_id, generation, name, entropy, number)| {
            ClientFrame::Request(Request::Identify(Identity {
                clone_id,
                generation: Generation(generation),
                hostname: name.clone(),
                machine_id: name,
                entropy,
                wall_clock: number,
                cid: number,
            }))
        }),
        (bytes(), any::<u32>(), any::<u64>()).prop_map(|(path, mode, length)| {
            ClientFrame::Request(Request::Put { path, mode, length })
        }),
        Just(ClientFrame::Request(Request::Health)),
        bytes().prop_map(ClientFrame::Stdin),
        Just(ClientFrame::StdinEnd),
        any::<u8>().prop_map(ClientFrame::Signal),
    ]
}

fn agent_frame() -> impl Strategy<Value = AgentFrame> {
    prop_oneof![
        any::<u32>().prop_map(|pid| AgentFrame::Started { pid }),
        bytes().prop_map(AgentFrame::Stdout),
        any::<u8>().prop_map(|code| AgentFrame::Ended(Exit::Code(code))),
        any::<u8>().prop_map(|signal| AgentFrame::Ended(Exit::Signal(signal))),
        (any::<i32>(), ".{0,200}")
            .prop_map(|(errno, text)| AgentFrame::Refused(Refusal { errno, text })),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_in_order_however_the_stream_is_cut(
        frames in vec(client_frame(), 0..6),
        step in 1usize..200,
    ) {
        let mut stream = Vec::new();
        for one in &frames {
            frame::write(&mut stream, one).unwrap();
        }
        let mut reader = Dribble { bytes: &stream, step };
        for one in &frames {
            let read = frame::read::<ClientFrame>(&mut reader).unwrap();
            prop_assert_eq!(read.as_ref(), Some(one));
        }
        prop_assert!(frame::read::<ClientFrame>(&mut reader).unwrap().is_none());
    }

    #[test]
    fn the_agents_frames_survive_the_way_too(one in agent_frame()) {
        let bytes = frame::encode(&one).unwrap();
        prop_assert_eq!(frame::read::<AgentFrame>(&mut &bytes[..]).unwrap(), Some(one));
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error(one in client_frame(), at in any::<prop::sample::Index>()) {
        let bytes = frame::encode(&one).unwrap();
        let cut = 1 + at.index(bytes.len() - 1);
        let read = frame::read::<ClientFrame>(&mut &bytes[..cut]);
        prop_assert!(matches!(read, Err(FrameError::Cut)), "{:?}", read);
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error_but_no_panic(body in vec(any::<u8>(), 0..200)) {
        let frame = frame::decode::<ClientFrame>(&body);
        if let Err(error) = frame {
            prop_assert!(matches!(error, FrameError::Nonsense(_)), "{:?}", error);
        }
    }
}

#[test]
fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
    let length = FRAME_MAX as u32 + 1;
    // Nothing follows the length: who wanted to read on would say that the stream was cut.
    let error = frame::read::<ClientFrame>(&mut &length.to_le_bytes()[..]).unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    assert!(error.to_string().contains("262145"), "{error}");
}

#[test]
fn a_frame_that_is_too_long_is_not_written() {
    let frame = ClientFrame::Stdin(Bytes(vec![0; FRAME_MAX]));
    let mut stream = Vec::new();
    let error = frame::write(&mut stream, &frame).unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    assert!(stream.is_empty());
}

#[test]
fn more_than_one_value_in_a_frame_is_nonsense() {
    let mut bytes = frame::encode(&ClientFrame::StdinEnd).unwrap().split_off(4);
    bytes.extend_from_within(..);
    let error = frame::decode::<ClientFrame>(&bytes).unwrap_err();
    assert!(matches!(error, FrameError::Nonsense(_)), "{error}");
}

#[test]
fn a_field_of_a_later_release_is_ignored() {
    #[derive(serde::Serialize)]
    enum Later {
        Hello {
            magic: &'static str,
            version: u32,
            features: u64,
            colour: &'static str,
        },
    }
    let later = Later::Hello {
        magic: "forkvm-agent",
        version: 1,
        features: u64::MAX,
        colour: "red",
    };
    let bytes = frame::encode(&later).unwrap();
    let Some(ClientFrame::Hello(hello)) = frame::read(&mut &bytes[..]).unwrap() else {
        panic!("a greeting");
    };
    assert_eq!(hello.fault(), None);
}

#[test]
fn another_version_and_another_magic_are_named() {
    let mut hello = Hello::new(0);
    hello.version = 7;
    assert!(hello.fault().unwrap().contains("version 7"));
    hello.magic = "ssh".into();
    assert!(hello.fault().unwrap().contains("\"ssh\""));
}

//! What is spoken over a control socket: one JSON object a line, each with the version of the protocol.
//!
//! `docs/control-socket.md` is its description for those who write clients. Bytes of consoles are base64: they
//! need not be text, and a string of JSON must be; an escape of our own would be one more thing for a client
//! to get wrong, where every language has base64.

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use forkvm::{FreezeKind, MemoryMode};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

pub(crate) use super::failure::{Failure, Kind};

/// The version: raised when something that was understood is not any more.
pub(crate) const VERSION: u64 = 1;

/// The key that carries it.
const KEY: &str = "forkvm";

/// Most bytes of a line that a machine reads.
pub(super) const LONGEST_REQUEST: usize = 64 * 1024;

/// Most bytes of a line that a command reads: a family may have thousands of VMs.
pub(super) const LONGEST_ANSWER: usize = 64 * 1024 * 1024;

/// Bytes of a console in one line.
pub(crate) const CONSOLE_CHUNK: usize = 32 * 1024;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What VMs there are.
    Ps {},
    /// What one is and does.
    Info { vm: String },
    /// It stands from now on.
    Pause { vm: String },
    /// It runs again.
    Resume { vm: String },
    /// It is saved, and ends.
    Save {
        vm: String,
        /// With an absolute path; nothing is there yet.
        dir: PathBuf,
    },
    /// Clones are made of it.
    Fork {
        vm: String,
        count: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory_mode: Option<MemoryMode>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        freeze: Option<FreezeKind>,
    },
    /// It ends.
    Kill { vm: String },
    /// Answered at its end.
    Wait { vm: String },
    /// From the answer on the connection is its console.
    Console { vm: String },
}

/// What a client sends once the connection is a console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Typed {
    /// Bytes for the guest.
    Input(Bytes),
}

/// What a machine sends then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Shown {
    /// The guest printed this.
    Printed(Bytes),
    /// So many bytes that it printed are missing here: the client did not read.
    Lost(u64),
    /// The VM has ended; nothing follows.
    Ended(Ending),
    /// What the client sent is not understood; nothing follows.
    Error(Failure),
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ending {
    /// In words.
    pub(crate) end: String,
    /// The guest's own.
    pub(crate) status: u32,
    /// What `forkvm run` ends with for it.
    pub(crate) exit_code: u8,
}

/// Bytes, base64 in JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Bytes).map_err(D::Error::custom)
    }
}

/// `message`, an object, as a line.
pub(super) fn to_line(message: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut object = Map::new();
    object.insert(KEY.into(), VERSION.into());
    if let Value::Object(message) = serde_json::to_value(message)? {
        object.extend(message);
    }
    let mut line = serde_json::to_vec(&object)?;
    line.push(b'\n');
    Ok(line)
}

/// What a line says, if it is of this version.
pub(super) fn from_line<T: for<'de> Deserialize<'de>>(line: &[u8]) -> Result<T, Failure> {
    let mut object: Map<String, Value> = serde_json::from_slice(line)
        .map_err(|error| Failure::usage(format!("a line is one JSON object: {error}")))?;
    match object.remove(KEY) {
        Some(version) if version == VERSION => {}
        Some(version) => {
            return Err(Failure::new(
                Kind::Version,
                format!(
                    "version {version} of the control protocol was spoken, and this forkvm ({}) speaks {VERSION}: \
                     use the forkvm that started the machine",
                    env!("CARGO_PKG_VERSION")
                ),
            ));
        }
        None => {
            let text =
                format!("a line names the version of the protocol: {{\"{KEY}\":{VERSION},…}}");
            return Err(Failure::usage(text));
        }
    }
    serde_json::from_value(Value::Object(object))
        .map_err(|error| Failure::usage(format!("this is not understood: {error}")))
}

/// The answer to a request, as a line carries it.
pub(super) fn answer(outcome: &Result<Value, Failure>) -> Value {
    match outcome {
        Ok(answer) => json!({ "ok": answer }),
        Err(failure) => json!({ "error": failure }),
    }
}

/// What an answer says.
pub(super) fn outcome(line: &[u8]) -> Result<Value, Failure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Answer {
        Ok(Value),
        Error(Failure),
    }
    match from_line(line)? {
        Answer::Ok(answer) => Ok(answer),
        Answer::Error(failure) => Err(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Request, Failure> {
        from_line(text.as_bytes())
    }

    #[test]
    fn a_request_is_as_its_description_shows_it() {
        let info = Request::Info { vm: "X.2".into() };
        let line = "{\"do\":\"info\",\"forkvm\":1,\"vm\":\"X.2\"}";
        assert_eq!(to_line(&info).unwrap(), format!("{line}\n").into_bytes());
        assert_eq!(request(line).unwrap(), info);
        let fork =
            "{\"forkvm\":1,\"do\":\"fork\",\"vm\":\"X\",\"count\":2,\"freeze\":\"write-protect\"}";
        assert!(matches!(
            request(fork).unwrap(),
            Request::Fork {
                count: 2,
                freeze: Some(FreezeKind::WriteProtect),
                memory_mode: None,
                ..
            }
        ));
        assert_eq!(
            request("{\"forkvm\":1,\"do\":\"ps\"}").unwrap(),
            Request::Ps {}
        );
    }

    #[test]
    fn what_is_not_understood_is_told_from_what_is_of_another_version() {
        for (line, kind) in [
            ("", Kind::Usage),
            ("nonsense", Kind::Usage),
            ("[1]", Kind::Usage),
            ("{\"do\":\"ps\"}", Kind::Usage),
            ("{\"forkvm\":1}", Kind::Usage),
            ("{\"forkvm\":1,\"do\":\"fly\"}", Kind::Usage),
            ("{\"forkvm\":1,\"do\":\"info\"}", Kind::Usage),
            (
                "{\"forkvm\":1,\"do\":\"info\",\"vm\":\"X\",\"also\":1}",
                Kind::Usage,
            ),
            ("{\"forkvm\":2,\"do\":\"fly\"}", Kind::Version),
            ("{\"forkvm\":\"1\",\"do\":\"ps\"}", Kind::Version),
        ] {
            assert_eq!(request(line).unwrap_err().kind, kind, "{line}");
        }
    }

    #[test]
    fn what_a_console_prints_need_not_be_text() {
        let shown = Shown::Printed(Bytes(vec![0, 0xff, b'\n']));
        let line = to_line(&shown).unwrap();
        assert_eq!(line, b"{\"forkvm\":1,\"printed\":\"AP8K\"}\n");
        assert_eq!(from_line::<Shown>(&line).unwrap(), shown);
    }
}

//! As much of D-Bus as a question to the service manager takes: calls with texts, over a socket
//! that nobody else is on (D-Bus Specification, "Message Protocol").

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// systemd answers a call at once; jobs are waited for elsewhere.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of the longest message that is read.
const LONGEST: usize = 1 << 20;
/// Bytes of a line of the authentication.
const LONGEST_LINE: usize = 256;

const LITTLE_ENDIAN: u8 = b'l';
const VERSION: u8 = 1;

// Types of messages.
const CALL: u8 = 1;
const REPLY: u8 = 2;
const ERROR: u8 = 3;

// Header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// Bytes of the fixed part of a header.
const HEAD: usize = 16;

/// What a call is to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) name: &'a str,
}

/// A connection to one who answers.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
}

// === impl Bus ===

impl Bus {
    pub(super) fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // The user's number in decimal, each digit in hexadecimal.
        let user: String = nix::unistd::geteuid()
            .to_string()
            .bytes()
            .map(|digit| format!("{digit:02x}"))
            .collect();
        // All of it at once, as systemd's own programs do: a call that systemd reads together with
        // the `BEGIN` waits there for the next one.
        stream.write_all(format!("\0AUTH EXTERNAL {user}\r\nBEGIN\r\n").as_bytes())?;
        let answer = line(&mut stream)?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::other(format!(
                "it does not let this user in: {answer}"
            )));
        }
        Ok(Self { stream, serial: 0 })
    }

    /// Calls with texts, and gives the text that is answered.
    pub(super) fn call(&mut self, method: &Method<'_>, words: &[&str]) -> io::Result<String> {
        let body = self.call_for_body(method, words)?;
        Ok(first_text(&body).unwrap_or_default())
    }

    /// Calls with texts, and gives the number that is answered.
    pub(super) fn call_for_number(
        &mut self,
        method: &Method<'_>,
        words: &[&str],
    ) -> io::Result<Option<u32>> {
        let body = self.call_for_body(method, words)?;
        Ok(body
            .starts_with(&[1, b'u', 0])
            .then(|| number(&body, 4))
            .flatten())
    }

    fn call_for_body(&mut self, method: &Method<'_>, words: &[&str]) -> io::Result<Vec<u8>> {
        self.serial += 1;
        self.stream.write_all(&call(self.serial, method, words))?;
        loop {
            let (kind, answers, body) = self.message()?;
            // Signals are sent to all, whether they have asked or not.
            if answers != Some(self.serial) {
                continue;
            }
            match kind {
                REPLY => return Ok(body),
                ERROR => return Err(io::Error::other(first_text(&body).unwrap_or_default())),
                _ => {}
            }
        }
    }

    /// The next message: its type, the serial of the call that it answers, and its body.
    fn message(&mut self) -> io::Result<(u8, Option<u32>, Vec<u8>)> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "not a D-Bus message");
        let mut head = [0; HEAD];
        self.stream.read_exact(&mut head)?;
        if head[0] != LITTLE_ENDIAN || head[3] != VERSION {
            return Err(malformed());
        }
        let body = number(&head, 4).ok_or_else(malformed)? as usize;
        let fields = number(&head, 12).ok_or_else(malformed)? as usize;
        if body > LONGEST || fields > LONGEST {
            return Err(malformed());
        }
        let mut rest = vec![0; fields.next_multiple_of(8) + body];
        self.stream.read_exact(&mut rest)?;
        let body = rest.split_off(fields.next_multiple_of(8));
        rest.truncate(fields);
        Ok((head[1], reply_serial(&rest), body))
    }
}

fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LONGEST_LINE && !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

fn call(serial: u32, method: &Method<'_>, words: &[&str]) -> Vec<u8> {
    let mut body = Vec::new();
    for word in words {
        put_text(&mut body, word);
    }
    let mut fields = Vec::new();
    for (code, kind, value) in [
        (PATH, b'o', method.path),
        (INTERFACE, b's', method.interface),
        (MEMBER, b's', method.name),
        (DESTINATION, b's', method.destination),
    ] {
        align(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        put_text(&mut fields, value);
    }
    align(&mut fields, 8);
    fields.extend([SIGNATURE, 1, b'g', 0]);
    fields.extend(u8::try_from(words.len()));
    fields.extend(std::iter::repeat_n(b's', words.len()));
    fields.push(0);

    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut message = vec![LITTLE_ENDIAN, CALL, 0, VERSION];
    message.extend(length(&body));
    message.extend(serial.to_le_bytes());
    message.extend(length(&fields));
    message.extend(fields);
    align(&mut message, 8);
    message.extend(body);
    message
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    align(bytes, 4);
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(text.bytes());
    bytes.push(0);
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn text(bytes: &[u8], at: usize) -> Option<&str> {
    let length = number(bytes, at)? as usize;
    std::str::from_utf8(bytes.get(at + 4..at + 4 + length)?).ok()
}

/// The serial that a message's header fields say it answers.
fn reply_serial(fields: &[u8]) -> Option<u32> {
    let mut at = 0_usize;
    loop {
        at = at.next_multiple_of(8);
        let code = *fields.get(at)?;
        // Each value has a type of one letter.
        let kind = *fields.get(at + 2)?;
        at += 4;
        match kind {
            b'u' if code == REPLY_SERIAL => return number(fields, at),
            b'u' => at += 4,
            b's' | b'o' => at += 4 + number(fields, at)? as usize + 1,
            b'g' => at += usize::from(*fields.get(at)?) + 2,
            _ => return None,
        }
    }
}

/// The text that a body begins with: by itself, as a variant, or behind a number in a structure of two,
/// as jobs are.
fn first_text(body: &[u8]) -> Option<String> {
    let at = if body.starts_with(&[1, b's', 0]) {
        4
    } else if body.starts_with(b"\x04(uo)\0") {
        12
    } else {
        0
    };
    text(body, at).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    const METHOD: Method<'_> = Method {
        destination: "org.example",
        path: "/org/example",
        interface: "org.example.Manager",
        name: "Start",
    };

    #[test]
    fn a_call_is_written_as_the_specification_has_it() {
        let message = call(7, &METHOD, &["jobs.slice", "replace"]);
        assert_eq!(message[..4], [b'l', 1, 0, 1]);
        let fields = number(&message, 12).unwrap() as usize;
        let body = number(&message, 4).unwrap() as usize;
        let begin = (HEAD + fields).next_multiple_of(8);
        assert_eq!(message.len(), begin + body);
        assert_eq!(text(&message[begin..], 0), Some("jobs.slice"));
        assert_eq!(text(&message[begin..], 16), Some("replace"));
        let signature = [b'g', 0, 2, b's', b's', 0];
        let mut parts = message[HEAD..begin].windows(signature.len());
        assert!(parts.any(|part| part == signature));
    }

    /// An answer as systemd writes it.
    fn answer(kind: u8, to: u32, body: &[u8]) -> Vec<u8> {
        let mut fields = vec![REPLY_SERIAL, 1, b'u', 0];
        fields.extend(to.to_le_bytes());
        fields.extend([SIGNATURE, 1, b'g', 0, 1, b's', 0]);
        let mut message = vec![LITTLE_ENDIAN, kind, 1, VERSION];
        message.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        message.extend(9_u32.to_le_bytes());
        message.extend(u32::try_from(fields.len()).unwrap().to_le_bytes());
        message.extend(fields);
        align(&mut message, 8);
        message.extend(body);
        message
    }

    /// Asks one who says these answers.
    fn ask(answers: Vec<Vec<u8>>) -> io::Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("private");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(line(&mut stream).unwrap().starts_with("\0AUTH EXTERNAL 3"));
            assert_eq!(line(&mut stream).unwrap(), "BEGIN");
            stream.write_all(b"OK 1234\r\n").unwrap();
            let mut head = [0; HEAD];
            stream.read_exact(&mut head).unwrap();
            for answer in answers {
                stream.write_all(&answer).unwrap();
            }
        });
        let answered = Bus::connect(&socket)?.call(&METHOD, &["jobs.slice"]);
        server.join().unwrap();
        answered
    }

    #[test]
    fn the_answer_is_taken_and_what_others_are_told_is_not() {
        let mut body = Vec::new();
        put_text(&mut body, "/org/example/job/1");
        let signal = answer(4, 0, b"\x05\0\0\0other\0");
        let said = ask(vec![signal, answer(REPLY, 1, &body)]).unwrap();
        assert_eq!(said, "/org/example/job/1");
        // A variant, as properties are.
        let mut body = vec![1, b's', 0, 0];
        put_text(&mut body, "system.slice");
        assert_eq!(ask(vec![answer(REPLY, 1, &body)]).unwrap(), "system.slice");
        // The job of a unit.
        let mut body = b"\x04(uo)\0\0\0\x07\0\0\0".to_vec();
        put_text(&mut body, "/org/example/job/7");
        assert_eq!(
            ask(vec![answer(REPLY, 1, &body)]).unwrap(),
            "/org/example/job/7"
        );
        let mut body = Vec::new();
        put_text(&mut body, "Unit jobs.slice is masked.");
        let refused = ask(vec![answer(ERROR, 1, &body)]).unwrap_err();
        assert_eq!(refused.to_string(), "Unit jobs.slice is masked.");
        assert!(ask(vec![b"HTTP/1.1 400 Bad Request\r\n".to_vec()]).is_err());
    }
}

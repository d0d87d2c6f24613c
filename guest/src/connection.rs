//! One client's connection: bytes in, commands, replies out.

use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use crate::bytes::append;
use crate::command::{Arguments, Context, Outcome, Session, execute, hexadecimal};
use crate::reply::ReplyWriter;
use crate::resp::{COMMAND_BYTES_MAX, Parser, Progress, ProtocolError};
use crate::server::{Host, Statistics};
use crate::store::Store;
use crate::sum::Checksum;

/// Replies gathered before the connection looks whether they can leave.
const REPLY_BYTES_AT_ONCE: usize = 64 << 10;
/// Commands of one client run before the others get their turn.
const COMMANDS_AT_ONCE: usize = 512;
/// Empty buffers larger than this are given back.
const IDLE_BUFFER_BYTES: usize = 16 << 10;
/// How long a checksum may keep others waiting, in microseconds.
const SUM_SLICE_US: u64 = 200;

/// A command whose reply comes later. Commands behind it wait.
#[derive(Clone, Copy)]
enum Task {
    Sum(Checksum),
    Dirty,
}

/// What all connections share while they are served.
pub struct Shared<'a, H: Host> {
    /// The data.
    pub store: &'a mut Store,
    /// The machine.
    pub host: &'a mut H,
    /// The server's counts.
    pub statistics: &'a mut Statistics,
    /// A buffer for replies, empty between connections. One for all, so that few pages get dirty.
    pub replies: &'a mut Vec<u8>,
}

/// One client's connection.
pub struct Connection {
    /// The socket.
    pub handle: SocketHandle,
    /// Whether a client was greeted (counted) on it.
    pub is_open: bool,
    session: Session,
    parser: Parser,
    /// What arrived and is not understood yet.
    input: Vec<u8>,
    /// Replies that did not fit into the socket's buffer, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    task: Option<Task>,
    /// No more commands: close when everything is sent.
    is_closing: bool,
}

impl Connection {
    /// A connection on `handle` without a client.
    pub fn new(handle: SocketHandle) -> Connection {
        Connection {
            handle,
            is_open: false,
            session: Session::default(),
            parser: Parser::new(),
            input: Vec::new(),
            unsent: Vec::new(),
            sent: 0,
            task: None,
            is_closing: false,
        }
    }

    /// Greets a client. `id` is the connection's number.
    pub fn open(&mut self, id: u64) {
        self.is_open = true;
        self.session.id = id;
    }

    /// Forgets the client, for the next one.
    pub fn reset(&mut self) {
        *self = Connection::new(self.handle);
    }

    /// Whether the client waits for the memory writer to take a plan.
    pub fn awaits_writer(&self) -> bool {
        matches!(self.task, Some(Task::Dirty))
    }

    /// Does what can be done now. Whether anything was.
    pub fn serve<H: Host>(&mut self, socket: &mut Socket<'_>, shared: &mut Shared<'_, H>) -> bool {
        let mut progress = self.send_unsent(socket);
        if self.task.is_some() {
            progress |= self.work_on_task(shared);
        }
        if self.is_closing {
            progress |= drain(socket);
        } else if self.task.is_none() && self.unsent.is_empty() {
            progress |= self.receive(socket, shared);
            if !self.input.is_empty() {
                progress |= self.run_commands(shared);
            }
        }
        if !shared.replies.is_empty() {
            self.send_replies(socket, shared.replies);
            progress = true;
        }
        self.close_if_done(socket);
        progress
    }

    /// Sends what was left of earlier replies.
    fn send_unsent(&mut self, socket: &mut Socket<'_>) -> bool {
        let Some(rest @ [_, ..]) = self.unsent.get(self.sent..) else { return false };
        let sent = socket.send_slice(rest).unwrap_or(0);
        self.sent += sent;
        if self.sent == self.unsent.len() {
            self.unsent = Vec::new();
            self.sent = 0;
        }
        sent > 0
    }

    fn work_on_task<H: Host>(&mut self, shared: &mut Shared<'_, H>) -> bool {
        let mut reply = ReplyWriter::new(shared.replies, self.session.dialect);
        match &mut self.task {
            Some(Task::Sum(checksum)) => {
                if shared.host.sum_some(checksum, SUM_SLICE_US) {
                    hexadecimal(checksum.value(), &mut reply);
                    self.task = None;
                }
                true
            }
            Some(Task::Dirty) => {
                let is_settled = shared.host.dirty_is_settled();
                if is_settled {
                    reply.ok();
                    self.task = None;
                }
                is_settled
            }
            None => false,
        }
    }

    /// Takes what arrived, as long as a command may need it.
    fn receive<H: Host>(&mut self, socket: &mut Socket<'_>, shared: &mut Shared<'_, H>) -> bool {
        let mut received = 0;
        while socket.can_recv() && self.input.len() <= COMMAND_BYTES_MAX {
            let taken = socket.recv(|bytes| match append(&mut self.input, bytes) {
                Ok(()) => (bytes.len(), Ok(bytes.len())),
                Err(error) => (0, Err(error)),
            });
            match taken {
                Ok(Ok(bytes @ 1..)) => received += bytes,
                // What was flushed and is not freed yet may be enough.
                Ok(Err(_)) if shared.store.tidy_all() => {}
                Ok(Err(_)) => {
                    // The rest of the command cannot even be told from the next one without taking
                    // it in.
                    self.refuse(ProtocolError::Memory, shared);
                    self.input = Vec::new();
                    return true;
                }
                _ => break,
            }
        }
        received > 0
    }

    /// Tells the client why it is not understood, and lets go of it.
    fn refuse<H: Host>(&mut self, error: ProtocolError, shared: &mut Shared<'_, H>) {
        let mut reply = ReplyWriter::new(shared.replies, self.session.dialect);
        match error {
            ProtocolError::ExpectedBulk(byte) => {
                reply.error_parts(&[error.text().as_bytes(), b", got '", &[byte], b"'"]);
            }
            _ => reply.error(error.text()),
        }
        self.is_closing = true;
    }

    /// Runs the commands that are complete. Whether there was one.
    fn run_commands<H: Host>(&mut self, shared: &mut Shared<'_, H>) -> bool {
        let mut done = 0;
        let mut commands = 0;
        while commands < COMMANDS_AT_ONCE && shared.replies.len() < REPLY_BYTES_AT_ONCE {
            let input = self.input.get(done..).unwrap_or(&[]);
            let bytes = match self.parser.advance(input) {
                Ok(Progress::Ready(bytes)) => bytes,
                Ok(Progress::NeedMore) => break,
                Err(error) => {
                    self.refuse(error, shared);
                    break;
                }
            };
            commands += 1;
            if self.parser.argument_count() > 0 {
                self.run_command(done, shared);
            }
            self.parser.next_command();
            done += bytes;
            if self.is_closing || self.task.is_some() {
                break;
            }
        }
        if done == self.input.len() {
            self.input.clear();
            self.input.shrink_to(IDLE_BUFFER_BYTES);
        } else if done > 0 {
            self.input.drain(..done);
        }
        commands > 0 || self.is_closing
    }

    /// Runs the complete command that starts at `start` of the input.
    fn run_command<H: Host>(&mut self, start: usize, shared: &mut Shared<'_, H>) {
        shared.statistics.commands += 1;
        let input = self.input.get(start..).unwrap_or(&[]);
        let mut reply = ReplyWriter::new(shared.replies, self.session.dialect);
        let mut context = Context {
            store: shared.store,
            host: shared.host,
            session: &mut self.session,
            statistics: shared.statistics,
        };
        match execute(Arguments::new(&self.parser, input), &mut context, &mut reply) {
            Outcome::Done => {}
            Outcome::Close => self.is_closing = true,
            Outcome::Sum(checksum) => self.task = Some(Task::Sum(checksum)),
            Outcome::Dirty => self.task = Some(Task::Dirty),
        }
        if reply.is_broken() {
            // Half a reply went into the buffer for want of memory. The client sees the connection
            // end there.
            self.is_closing = true;
        }
    }

    /// Sends `replies`, keeping what does not fit into the socket's buffer.
    fn send_replies(&mut self, socket: &mut Socket<'_>, replies: &mut Vec<u8>) {
        let sent = if self.unsent.is_empty() { socket.send_slice(replies).unwrap_or(0) } else { 0 };
        if sent < replies.len() && socket.may_send() {
            if self.unsent.is_empty() {
                // The large buffer goes with the connection; the next replies start a new one.
                self.sent = sent;
                core::mem::swap(&mut self.unsent, replies);
            } else if append(&mut self.unsent, replies).is_err() {
                socket.abort();
            }
        }
        replies.clear();
        replies.shrink_to(2 * REPLY_BYTES_AT_ONCE);
    }

    /// Closes our side once all is said, or once the client has closed its side and nothing is left
    /// to do for it.
    fn close_if_done(&mut self, socket: &mut Socket<'_>) {
        let peer_closed = socket.state() == State::CloseWait && !socket.can_recv() && self.task.is_none();
        let idle_input = self.input.is_empty() || !self.may_have_command();
        if self.unsent.is_empty() && (self.is_closing || (peer_closed && idle_input)) && socket.may_send() {
            socket.close();
        }
    }

    /// Whether another round could find a complete command in the input.
    fn may_have_command(&mut self) -> bool {
        !matches!(self.parser.advance(&self.input), Ok(Progress::NeedMore))
    }
}

/// Throws away what a client still sends, which might otherwise never come to read our last reply.
fn drain(socket: &mut Socket<'_>) -> bool {
    let mut drained = 0;
    while socket.can_recv() {
        match socket.recv(|bytes| (bytes.len(), bytes.len())) {
            Ok(bytes @ 1..) => drained += bytes,
            _ => break,
        }
    }
    drained > 0
}

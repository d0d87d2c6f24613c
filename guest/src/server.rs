//! The TCP server: a pool of sockets on one interface, and the store behind them.
//!
//! Every connection of smoltcp needs a socket of its own that listens beforehand, so a few always
//! do; as soon as one of them is taken another joins them, before the next packet is looked at.

use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use crate::bytes::{OutOfMemory, zeroed};
use crate::connection::{Connection, Shared};
use crate::disk::{Content, DiskError, Run};
use crate::store::Store;
use crate::sum::Checksum;

/// The port served.
pub const PORT: u16 = 6379;
/// Most sockets, and so most clients at once.
pub const SOCKETS_MAX: usize = 1024;
/// Sockets that listen for the next clients.
const BACKLOG: usize = 16;
/// Size of a socket's receive buffer. One more byte would need window scaling, with which smoltcp
/// 0.14 takes the first window for a larger one than it has announced: a client that sends too much
/// could then write beyond the buffer's end, which panics.
const RECEIVE_BUFFER_BYTES: usize = (64 << 10) - 1;
/// Size of a socket's send buffer.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// Sockets made at the start, so that clients are served when the store has taken all memory: so
/// many, or what fits into an eighth of it.
const SOCKETS_AT_START: u64 = 80;
/// Packets taken in before the commands in them are run.
const PACKETS_AT_ONCE: usize = 64;

/// How much faster the network stack's clock runs than the guest's. The stack never retransmits
/// earlier than after one second of its clock, for networks that are far; ours is near, and after a
/// takeover a client should not wait so long for a reply that died with the old host. So its second
/// is a tenth of ours, and the durations given to it are ten times what is meant.
const CLOCK_SPEED: u64 = 10;
/// A client that finishes its handshake does so within this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30 * CLOCK_SPEED);
/// A client that answers neither data nor keep-alives for this long is gone.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(600 * CLOCK_SPEED);
/// How often a silent client is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(60 * CLOCK_SPEED);
/// How long an acknowledgement waits for data to travel with.
const ACK_DELAY: Duration = Duration::from_millis(10 * CLOCK_SPEED);
/// The longest wait when there is work that could not be done, for want of room in the device: it
/// wakes us when there is room.
const STUCK_WAIT_US: u64 = 1_000;
/// The longest wait while a client waits for the memory writer, which works on another vCPU and
/// cannot wake us.
const WRITER_WAIT_US: u64 = 1_000;

/// The machine as the commands see it.
pub trait Host {
    /// Guest time in microseconds.
    fn now_us(&self) -> u64;
    /// How many vCPUs there are.
    fn cpus(&self) -> u32;
    /// How many pages of RAM there are.
    fn memory_pages(&self) -> u64;
    /// How much of the heap is in use.
    fn memory(&self) -> MemoryUse;
    /// Asks the memory writer for `per_second` writes over `pages` pages.
    ///
    /// # Errors
    /// [`DirtyRefusal`].
    fn dirty_ask(&mut self, pages: u64, per_second: u64) -> Result<(), DirtyRefusal>;
    /// Whether the writer has taken what was asked for last.
    fn dirty_is_settled(&mut self) -> bool;
    /// What the writer is doing.
    fn dirty_status(&self) -> DirtyStatus;
    /// How many pages do not hold what was written there; `None` while a plan is not taken yet.
    fn dirty_wrong_pages(&mut self) -> Option<u64>;
    /// Goes on with `checksum` for about `slice_us` microseconds. Whether it is complete.
    fn sum_some(&mut self, checksum: &mut Checksum, slice_us: u64) -> bool;
    /// Whole blocks of the disk; 0 if there is none that can be written.
    fn disk_blocks(&self) -> u64;
    /// Writes into `block` what belongs there under `seed`.
    ///
    /// # Errors
    /// [`DiskError`].
    fn disk_write(&mut self, block: u64, seed: u64) -> Result<(), DiskError>;
    /// What `block` holds.
    ///
    /// # Errors
    /// [`DiskError`].
    fn disk_read(&mut self, block: u64) -> Result<Content, DiskError>;
    /// Returns when what was written to the disk outlives a loss of power.
    ///
    /// # Errors
    /// [`DiskError`].
    fn disk_flush(&mut self) -> Result<(), DiskError>;
    /// The disk's background writer.
    fn disk_run(&mut self) -> &mut Run;
    /// Switches the machine off.
    fn shut_down(&mut self);
}

/// How much of the heap is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// In use, in bytes.
    pub used_bytes: u64,
    /// Free, in bytes, in pieces of any size.
    pub free_bytes: u64,
}

/// Why a `DIRTY` was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyRefusal {
    /// The plan before it is not taken yet.
    Busy,
    /// There is no memory for so many pages.
    Memory,
}

/// What the memory writer is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyStatus {
    /// Pages of its region.
    pub pages: u64,
    /// Page writes per second asked for.
    pub per_second: u64,
    /// Page writes done.
    pub written: u64,
}

/// What the server counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// When it started, in guest time.
    pub started_us: u64,
    /// Clients now.
    pub connected: u64,
    /// Clients ever.
    pub connections: u64,
    /// Commands ever.
    pub commands: u64,
}

/// The server's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub ipv4: [u8; 4],
    /// Bits of its network's prefix.
    pub prefix_len: u8,
    /// The router to other networks, if there is one.
    pub gateway: Option<[u8; 4]>,
}

/// The server.
pub struct Server {
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// Indices into `connections` of those that wait for a client, have one, and do neither.
    listening: Vec<usize>,
    active: Vec<usize>,
    spare: Vec<usize>,
    store: Store,
    statistics: Statistics,
    replies: Vec<u8>,
    /// A client waits for the memory writer.
    awaits_writer: bool,
}

impl Server {
    /// A server at `address` on `device`. `seed` makes sequence numbers and hashes hard to guess.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new<H: Host>(
        device: &mut (impl Device + ?Sized),
        host: &H,
        address: Address,
        seed: u64,
    ) -> Result<Server, OutOfMemory> {
        let now_us = host.now_us();
        let mut config = Config::new(EthernetAddress(address.mac).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, device, stack_time(now_us));
        let [a, b, c, d] = address.ipv4;
        interface.update_ip_addrs(|addresses| {
            // The list has room for one.
            let _ = addresses.push(IpCidr::new(Ipv4Address::new(a, b, c, d).into(), address.prefix_len.min(32)));
        });
        if let Some([a, b, c, d]) = address.gateway {
            // The table has room for one.
            let _ = interface.routes_mut().add_default_ipv4_route(Ipv4Address::new(a, b, c, d));
        }
        let mut server = Server {
            interface,
            sockets: SocketSet::new(with_capacity(SOCKETS_MAX)?),
            connections: with_capacity(SOCKETS_MAX)?,
            listening: with_capacity(SOCKETS_MAX)?,
            active: with_capacity(SOCKETS_MAX)?,
            spare: with_capacity(SOCKETS_MAX)?,
            store: Store::new(seed),
            statistics: Statistics { started_us: now_us, ..Statistics::default() },
            replies: Vec::new(),
            awaits_writer: false,
        };
        let socket_bytes = (RECEIVE_BUFFER_BYTES + SEND_BUFFER_BYTES) as u64;
        for _ in 0..SOCKETS_AT_START.min(host.memory().free_bytes / 8 / socket_bytes) {
            let index = server.add_socket()?;
            server.spare.push(index);
        }
        server.fill_backlog();
        if server.listening.len() < BACKLOG { Err(OutOfMemory) } else { Ok(server) }
    }

    /// Takes packets in, runs commands, sends packets out. Whether there was anything to do: if
    /// not, nothing is to be done before [`Server::wait_us`] is over or the device has something.
    pub fn poll<H: Host>(&mut self, device: &mut (impl Device + ?Sized), host: &mut H) -> bool {
        let now = stack_time(host.now_us());
        let mut progress = false;
        for _ in 0..PACKETS_AT_ONCE {
            match self.interface.poll_ingress_single(now, device, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                _ => progress = true,
            }
            self.fill_backlog();
        }
        self.interface.poll_maintenance(now);
        progress |= self.serve(host);
        while self.interface.poll_egress(now, device, &mut self.sockets) == PollResult::SocketStateChanged {
            progress = true;
        }
        progress | self.store.tidy()
    }

    /// Microseconds until there may be something to do without the device's help, if ever.
    pub fn wait_us(&mut self, now_us: u64) -> Option<u64> {
        let timer_us = match self.interface.poll_delay(stack_time(now_us), &self.sockets).map(|d| d.total_micros()) {
            Some(0) => Some(STUCK_WAIT_US),
            timer => timer.map(|stack_us| stack_us.div_ceil(CLOCK_SPEED)),
        };
        timer_us.into_iter().chain(self.awaits_writer.then_some(WRITER_WAIT_US)).min()
    }

    /// Keeps enough sockets listening; those that were taken become active.
    fn fill_backlog(&mut self) {
        let mut at = 0;
        while let Some(index) = self.listening.get(at).copied() {
            if self.state(index) == State::Listen {
                at += 1;
            } else {
                self.listening.swap_remove(at);
                self.active.push(index);
            }
        }
        while self.listening.len() < BACKLOG {
            let Some(index) = self.spare.pop().or_else(|| self.add_socket().ok()) else { return };
            if self.listen(index) {
                self.listening.push(index);
            } else {
                self.spare.push(index);
                return;
            }
        }
    }

    fn state(&self, index: usize) -> State {
        self.connections.get(index).map_or(State::Closed, |c| self.sockets.get::<Socket>(c.handle).state())
    }

    /// A new socket with its connection; its index.
    fn add_socket(&mut self) -> Result<usize, OutOfMemory> {
        if self.connections.len() >= SOCKETS_MAX {
            return Err(OutOfMemory);
        }
        let receive = SocketBuffer::new(zeroed(RECEIVE_BUFFER_BYTES)?);
        let send = SocketBuffer::new(zeroed(SEND_BUFFER_BYTES)?);
        let handle = self.sockets.add(Socket::new(receive, send));
        self.connections.push(Connection::new(handle));
        Ok(self.connections.len() - 1)
    }

    fn listen(&mut self, index: usize) -> bool {
        let Some(connection) = self.connections.get_mut(index) else { return false };
        let socket = self.sockets.get_mut::<Socket>(connection.handle);
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        socket.set_keep_alive(None);
        socket.set_timeout(Some(HANDSHAKE_TIMEOUT));
        socket.listen(PORT).is_ok()
    }

    /// Lets every active connection do what it can.
    fn serve<H: Host>(&mut self, host: &mut H) -> bool {
        let mut progress = false;
        let mut at = 0;
        self.awaits_writer = false;
        while let Some(index) = self.active.get(at).copied() {
            let Some(connection) = self.connections.get_mut(index) else { break };
            let socket = self.sockets.get_mut::<Socket>(connection.handle);
            match socket.state() {
                // Closed, or reset during the handshake, which makes it listen again.
                state @ (State::Closed | State::Listen) => {
                    if connection.is_open {
                        self.statistics.connected -= 1;
                    }
                    connection.reset();
                    self.active.swap_remove(at);
                    if state == State::Listen {
                        self.listening.push(index)
                    } else {
                        self.spare.push(index)
                    }
                    continue;
                }
                State::SynSent | State::SynReceived => {}
                _ => {
                    if !connection.is_open {
                        self.statistics.connected += 1;
                        self.statistics.connections += 1;
                        connection.open(self.statistics.connections);
                        socket.set_timeout(Some(CLIENT_TIMEOUT));
                        socket.set_keep_alive(Some(KEEP_ALIVE));
                    }
                    let mut shared = Shared {
                        store: &mut self.store,
                        host,
                        statistics: &mut self.statistics,
                        replies: &mut self.replies,
                    };
                    progress |= connection.serve(socket, &mut shared);
                    self.awaits_writer |= connection.awaits_writer();
                }
            }
            at += 1;
        }
        progress
    }
}

/// Guest time as the network stack's clock shows it.
fn stack_time(now_us: u64) -> Instant {
    Instant::from_micros(i64::try_from(now_us.saturating_mul(CLOCK_SPEED)).unwrap_or(i64::MAX))
}

fn with_capacity<T>(count: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut items = Vec::new();
    items.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
    Ok(items)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;

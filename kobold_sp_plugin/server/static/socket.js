/**
 * A client for one Socket.IO server over a plain WebSocket: Engine.IO protocol 4, Socket.IO protocol 5,
 * text packets, default namespace. It connects again by itself until the page is left.
 *
 * Handlers are set with on(event, handler). Two names are the client's own: "connect" (no arguments) and
 * "disconnect" (seconds until the next attempt).
 */
export class SocketClient {
  static HANDSHAKE_MS = 10000;
  static LONGEST_WAIT_MS = 10000;

  #url;
  #handlers = new Map();
  #transport = null;
  #attempt = 0;
  #silence = SocketClient.HANDSHAKE_MS; // how long the server may say nothing before the line counts as dead
  #deadline = 0;
  #retry = 0;
  #answered = new Map(); // what to call when the server has dealt with the event of that number
  #sent = 0;

  /** True between the server's answer to our connect packet and the loss of the transport. */
  connected = false;
  /** Bytes the server takes in one message. */
  maxPayload = 1000000;

  constructor(url) {
    this.#url = url;
    // A laptop that wakes, or a network that returns, need not wait for the back-off.
    window.addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.#retryNow());
  }

  on(event, handler) {
    this.#handlers.set(event, handler);
  }

  /** Sends an event (nothing while not connected); `answered` is called when the server has dealt with it. */
  emit(event, payload, answered) {
    if (!this.connected) return;
    let number = "";
    if (answered) this.#answered.set((number = String((this.#sent += 1))), answered);
    this.#transport.send("42" + number + JSON.stringify([event, payload]));
  }

  open() {
    clearTimeout(this.#retry);
    this.#retry = 0;
    this.#silence = SocketClient.HANDSHAKE_MS;
    const transport = new WebSocket(this.#url);
    this.#transport = transport;
    transport.onmessage = ({ data }) => {
      this.#listen();
      this.#receive(data);
    };
    transport.onclose = () => this.#lost(transport);
    this.#listen();
  }

  #listen() {
    clearTimeout(this.#deadline);
    const transport = this.#transport;
    this.#deadline = setTimeout(() => this.#lost(transport), this.#silence);
  }

  #receive(packet) {
    const kind = packet[0];
    if (kind === "0") {
      const handshake = JSON.parse(packet.slice(1));
      this.#silence = handshake.pingInterval + handshake.pingTimeout;
      this.maxPayload = handshake.maxPayload || this.maxPayload;
      this.#listen();
      this.#transport.send("40");
    } else if (kind === "1") {
      this.#lost(this.#transport);
    } else if (kind === "2") {
      this.#transport.send("3" + packet.slice(1));
    } else if (kind === "4") {
      this.#message(packet[1], packet);
    }
  }

  #message(kind, packet) {
    if (kind === "0") {
      this.connected = true;
      this.#attempt = 0;
      this.#call("connect");
    } else if (kind === "1" || kind === "4") { // the server ends, or refuses, the session
      this.#lost(this.#transport);
    } else if (kind === "3") {
      const number = packet.slice(2, packet.indexOf("["));
      this.#answered.get(number)?.();
      this.#answered.delete(number);
    } else if (kind === "2") {
      this.#call(...JSON.parse(packet.slice(packet.indexOf("["))));
    }
  }

  #lost(transport) {
    if (transport !== this.#transport) return;
    // The line may be dead without the browser knowing: what it still says is about a session that is over.
    transport.onmessage = transport.onclose = null;
    transport.close();
    this.#transport = null;
    this.#answered.clear();
    this.connected = false;
    clearTimeout(this.#deadline);
    const wait = Math.min(SocketClient.LONGEST_WAIT_MS, 500 * 2 ** this.#attempt) * (0.75 + Math.random() / 4);
    this.#attempt += 1;
    this.#retry = setTimeout(() => this.open(), wait);
    this.#call("disconnect", wait / 1000);
  }

  #retryNow() {
    if (this.#retry) this.open();
  }

  #call(event, ...payload) {
    this.#handlers.get(event)?.(...payload);
  }
}

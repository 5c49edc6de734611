// Added to United's new page: what its "Create New Soft Prompt" has begun, until it is closed.
document.addEventListener("DOMContentLoaded", function () {
	if (!window.socket) return;
	const panel = document.createElement("div");
	panel.id = "softprompt-training";
	panel.style.cssText = "display:none;position:fixed;right:16px;top:64px;width:360px;max-width:calc(100vw - 32px);" +
		"z-index:9999;padding:12px 14px;border-radius:5px;font-size:14px;line-height:1.4;overflow-wrap:anywhere;" +
		"background:var(--popup_background_color,#303030);color:var(--popup_item_color_text,#fff);" +
		"box-shadow:0 2px 14px rgba(0,0,0,.6)";
	function add(tag, css) {
		const element = document.createElement(tag);
		element.style.cssText = css || "";
		panel.appendChild(element);
		return element;
	}
	const title = add("div", "font-weight:bold;margin-bottom:4px");
	const bar = add("progress", "width:100%");
	const numbers = add("div");
	const message = add("div", "max-height:30vh;overflow-y:auto;margin:4px 0 8px;white-space:pre-wrap");
	const button = add("button");
	button.type = "button";
	button.className = "btn btn-primary";
	document.body.appendChild(panel);

	const titles = {running: "Training ", stopping: "Ending ", done: "Trained ", cancelled: "Paused ", failed: "Not trained: "};
	let status = {state: "none"};
	function time(seconds) {
		const all = Math.round(seconds), rest = all % 60;
		return Math.floor(all / 60) + ":" + (rest < 10 ? "0" : "") + rest;
	}
	function show() {
		const runs = status.state === "running" || status.state === "stopping";
		panel.style.display = status.state === "none" ? "none" : "block";
		title.textContent = (titles[status.state] || "") + (status.name || "");
		bar.style.display = runs ? "block" : "none";
		if (status.steps) { bar.max = status.steps; bar.value = status.step; } else { bar.removeAttribute("value"); }
		const parts = [];
		if (status.steps) parts.push("step " + status.step + " of " + status.steps);
		if (typeof status.loss === "number") parts.push("loss " + status.loss.toFixed(3));
		if (typeof status.held_out === "number") parts.push("held out " + status.held_out.toFixed(3));
		if (runs && typeof status.seconds_left === "number") parts.push(time(status.seconds_left) + " left");
		numbers.textContent = status.state === "failed" ? "" : parts.join(", ");
		message.textContent = status.message || "";
		button.textContent = runs ? "Cancel" : "Close";
		button.disabled = status.state === "stopping";
	}
	button.addEventListener("click", function () {
		if (status.state === "running") socket.emit("softprompt_training_cancel", "");
		else panel.style.display = "none";
	});
	socket.on("softprompt_training", function (told) { status = told; show(); });
});

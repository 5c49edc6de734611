"""The words of each genre: what the slots of the shared sentence frames are filled from.

A slot holds one kind of phrase, the same in every genre, so that any shared frame is grammatical in
any genre. The kinds:

===========  ======================================================================================
men, women   the leading man and woman, the same in every story: "first mention > later mentions"
room         a place indoors, after "in"
ground       open ground, after "across"
goal         where the story leads, after "to"
thing        a small object, without article
prize        what everybody looks for, with article
weapon, drink, clothes, seat (has a surface to put things on), ride, light, beast: without article
sound        what is heard, with article; sight: what is seen, with article
smell        after "smelled of"
weather      a clause in the past tense, after "Outside,"
role         a minor character, with "the"; foe: an opponent, singular, with article if any
group        opponents, plural, with article
trade        what the hero is, without article
address      how strangers address the hero
oath         an exclamation, without its mark
news         a clause in the present or past tense that somebody brings
plan         a bare infinitive: what the hero sets out to do
memory       a past event, after "remembered"
cover        what one hides behind, with article
pay          a sum of money
saying       a clause that somebody says as a rule of life
quiet        what is quiet, after "as quiet as"
time         when, at the end of a sentence
===========  ======================================================================================
"""

from typing import Dict, List

NOIR = {
    "men": "Jack Malone > Malone; Detective Malone > Malone",
    "women": "Rita Vance > Rita; Miss Rita Vance > Rita",
    "room": "the office; the back room of the Blue Parrot; the hotel lobby; the elevator; the bar on "
    "Ninth Street; the interrogation room; the morgue; the apartment over the laundry",
    "ground": "the wet street; the alley; the parking lot; the empty sidewalk; the tracks of the "
    "streetcar; the rooftop",
    "goal": "the docks; the Crescent Hotel; Union Station; the warehouse on Pier Nine; the Moretti "
    "place; the courthouse; the track at Bay Park",
    "thing": "cigarette case; matchbook; photograph; police badge; fedora; lighter; case file; newspaper; "
    "ashtray; envelope; hotel key; business card; pawn ticket",
    "prize": "the Delgado file; the missing ledger; the emerald necklace; the roll of negatives; the second "
    "set of books; the signed confession; the film can",
    "weapon": "revolver; snub-nosed thirty-eight; blackjack; automatic; switchblade; sawed-off shotgun",
    "drink": "bourbon; black coffee; rye; cheap gin; scotch",
    "clothes": "trench coat; raincoat; old overcoat; cheap suit jacket",
    "seat": "desk; bar; filing cabinet; pool table; typewriter table",
    "ride": "black sedan; taxi; patrol car; green Packard; night bus",
    "light": "neon sign; street lamp; desk lamp; bare bulb; match",
    "beast": "alley cat; police dog; rat; stray dog",
    "sound": "a siren; a saxophone; a car door; the rattle of a streetcar; a telephone; the click of a "
    "safety catch; the tap of heels on the sidewalk",
    "sight": "a row of dark windows; two men in gray hats; a chalk outline; the glow of a cigarette; a "
    "shadow under the street lamp; a car with its lights off",
    "smell": "rain and cheap cigars; gasoline; stale smoke; perfume and gunpowder; wet newspaper; hair oil and whiskey",
    "weather": "rain ran down the window; the fog rolled in from the bay; the city would not sleep; "
    "the neon blinked red and blue; it was raining on the just and the crooked; the gutters ran over",
    "role": "the bartender; the desk clerk; the coroner; the elevator boy; the cigarette girl; the "
    "night watchman; the pawnbroker",
    "foe": "Big Tony Moretti; the district attorney; the man in the gray hat; the crooked lieutenant; "
    "the widow's lawyer; the Greek; the blackmailer",
    "group": "the police; the Moretti boys; the vice squad; the reporters; the loan sharks",
    "trade": "private detective; reporter; insurance investigator; nightclub singer; bail bondsman; cop",
    "address": "detective; pal; friend; wise guy",
    "oath": "Damn it; For crying out loud; Nuts; Don't be a sap",
    "news": "there is a body in the river; somebody shot the bookkeeper; the witness skipped town; the "
    "alibi is a phony; the safe was empty when the cops came; they found blood in the taxi; the dame "
    "was never married",
    "plan": "find out who killed Eddie Lasko; get the bookkeeper to talk; clear the dead man's name; "
    "break the Moretti alibi; catch the blackmailer; pay off the bookie; find the girl before the cops "
    "do; pin the murder on the right man",
    "memory": "the fire at the Blue Parrot; the Lasko trial; the shooting on Ninth Street; the "
    "payroll robbery; the death of the last partner",
    "cover": "the filing cabinet; a parked car; the trash cans; the newsstand; the phone booth; the velvet curtain",
    "pay": "two hundred dollars; fifty bucks; a roll of tens; ten grand; a stack of twenties",
    "saying": "in this town the truth costs extra; everybody has an alibi until somebody checks it; a "
    "dead man tells no lies to a jury; the house always wins; nobody is innocent after midnight; a "
    "straight answer is the rarest thing in this city",
    "quiet": "the morgue; a closed case; a bought witness; an empty courtroom",
    "time": "after midnight; at closing time; at three in the morning; before the morning edition; on a Tuesday night",
}

PIRATE = {
    "men": "Captain Flint > Flint; Captain Jonas Flint > Flint",
    "women": "Red Bess > Bess; Bess Blackwood > Bess",
    "room": "the captain's cabin; the galley; the hold; the gun deck; the tavern by the harbor; the "
    "brig; the forecastle; the rum cellar",
    "ground": "the deck; the white beach; the quay; the shallows; the burning deck; the sandbar",
    "goal": "Skull Island; Tortuga; the Spanish fort; Port Royal; the lagoon; Dead Man's Cove; the wreck on the reef",
    "thing": "spyglass; compass; bottle; sea chart; gold coin; silver whistle; wooden leg; tricorn hat; "
    "snuffbox; black flag; brass bell; hourglass",
    "prize": "the map of Skull Island; the Spanish gold; the governor's ransom; the cursed doubloon; "
    "the captain's black pearl; the key to the treasure chest; the great pearl of Tortuga",
    "weapon": "cutlass; flintlock pistol; boarding axe; dagger; musket; harpoon",
    "drink": "rum; grog; Spanish wine; stolen brandy; warm ale",
    "clothes": "salt-stained coat; red sash; oilskin; striped shirt",
    "seat": "sea chest; rum barrel; cannon; hatch cover; chart table",
    "ride": "longboat; schooner; black brigantine; captured sloop; leaking rowboat",
    "light": "ship's lantern; storm lamp; binnacle lamp; tallow candle; signal fire",
    "beast": "parrot; ship's cat; monkey; gull",
    "sound": "a cannon; the ship's bell; a gull; the creak of the mast; a drunken shanty; the splash of "
    "oars; the snap of a sail",
    "sight": "a sail on the horizon; the black flag at the masthead; a fin in the water; the lights of "
    "the harbor; a skeleton chained to a mast; a ship without a crew",
    "smell": "tar and salt; rum and gunpowder; rotten fish; wet rope; seaweed; old canvas",
    "weather": "the waves broke over the bow; a storm was rising from the south; the wind sang in the "
    "rigging; the tide was going out; the sails hung slack in the heat; the fog lay thick on the sea",
    "role": "the cabin boy; the ship's cook; the helmsman; the old gunner; the harbor master; the "
    "lookout; the tavern keeper",
    "foe": "the Spanish admiral; the governor of Port Royal; Black Tom; the first mate; Mad Meg; the "
    "hangman of Port Royal; the sea witch",
    "group": "the Navy men; the mutineers; the Spaniards; the wreckers; the men of the Crimson Gull",
    "trade": "pirate; smuggler; ship's gunner; navigator; privateer; powder monkey",
    "address": "captain; matey; ye scurvy dog; sailor",
    "oath": "Shiver me timbers; Blow me down; By the devil's beard; Avast",
    "news": "there is a mutiny below decks; the Navy is in the harbor; the rum is gone; the anchor "
    "chain is cut; the lookout saw a sail; the powder is wet; they mean to hang the whole crew",
    "plan": "dig up the Spanish gold; sink the admiral's ship; take the schooner before dawn; sail "
    "around the Horn; free the crew from the fort; outrun the Navy; read the treasure map; maroon the "
    "mutineers",
    "memory": "the storm off Tortuga; the mutiny on the Crimson Gull; the battle in the lagoon; the "
    "weeks on the sandbar; the hanging at Port Royal",
    "cover": "the water barrels; the mast; the cannon; a heap of sails; the ship's wheel; the crates of powder",
    "pay": "forty doubloons; a chest of silver; a sack of plunder; a handful of pearls; twenty pieces of eight",
    "saying": "the sea takes what it wants; dead men tell no tales; a rope is a short friend; no prey, "
    "no pay; every map lies a little; the tide waits for no captain",
    "quiet": "the bottom of the sea; a ship becalmed; a drowned man; a beach at low tide",
    "time": "on the morning tide; at eight bells; before the next storm; in the middle of the dog "
    "watch; at the turn of the tide",
}

FAIRY = {
    "men": "Prince Florian > Florian; Florian of Thornwood > Florian",
    "women": "Princess Isolde > Isolde; Isolde the Clever > Isolde",
    "room": "the throne room; the witch's kitchen; the tower; the cottage; the dragon's cave; the mill; "
    "the enchanted ballroom; the giant's pantry",
    "ground": "the meadow; the frozen pond; the castle bridge; the clearing in the forest; the rose "
    "garden; the mossy stones",
    "goal": "the glass mountain; the castle; the witch's cottage; the wishing well; the end of the "
    "rainbow; the enchanted forest; the giant's house",
    "thing": "golden apple; magic mirror; glass slipper; silver spindle; silver key; crown; red cloak; "
    "wand; music box; basket of berries; enchanted ring; feather pen",
    "prize": "the golden goose; the unicorn's horn; the queen's golden comb; the water of life; the dragon's "
    "egg; the lost crown; the rose that never fades",
    "weapon": "enchanted sword; wand; silver bow; iron poker; wooden sword; bag of magic beans",
    "drink": "honey milk; elderberry wine; mead; witch's brew; dew from a rose",
    "clothes": "red hood; velvet cape; patched mantle; cloak of leaves",
    "seat": "throne; spinning stool; toadstool; kitchen table; garden bench",
    "ride": "golden coach; hay cart; flying carpet; swan boat; pumpkin carriage",
    "light": "candle; firefly; fairy lamp; enchanted rose; night candle",
    "beast": "talking frog; raven; unicorn; gray goose; little dragon",
    "sound": "a silver bell; a wolf; an owl; the song of a nightingale; the roar of the dragon; tiny "
    "footsteps; a fairy's laugh",
    "sight": "a house made of gingerbread; a ring of mushrooms; a tower without a door; seven little "
    "beds; a path of white pebbles; a door in an oak tree",
    "smell": "roses and fresh bread; gingerbread; moss and mushrooms; honey; spells and candle wax; apples",
    "weather": "the snow fell on the enchanted forest; the moon smiled down on the castle; the roses "
    "were asleep; the north wind told stories to the trees; a rainbow stood over the mill; the fairies "
    "danced in the dew",
    "role": "the miller; the old witch; the court jester; the talking cat; the godmother; the littlest "
    "dwarf; the royal cook",
    "foe": "the wicked stepmother; the giant; the troll under the bridge; the evil wizard; the dragon; "
    "the snow queen; the big bad wolf",
    "group": "the king's guards; the goblins; the three trolls; the dwarfs; the wicked sisters",
    "trade": "royal messenger; woodcutter; flute player; fairy; kitchen maid; wizard's apprentice",
    "address": "my child; your majesty; little one; good traveler",
    "oath": "Bless my soul; Goodness me; By the seven dwarfs; Dear me",
    "news": "the princess has fallen asleep; the spell is broken; the dragon is awake; the king has "
    "turned into a frog; the wolf ate the grandmother; there is a witch at the well; the magic beans "
    "have sprouted",
    "plan": "wake the sleeping princess; break the spell; guess the dwarf's name; climb the beanstalk; "
    "trick the troll; bring the dragon a gift; find the hidden kingdom; win three wishes",
    "memory": "the casting of the spell; the royal wedding; the winter of the snow queen; the great "
    "ball at the castle; the wish at the well",
    "cover": "the old oak; a toadstool; the throne; the rose bushes; the spinning wheel; the oven",
    "pay": "a bag of gold; a purse of pearls; three magic coins; a ruby as big as an egg; seven silver pennies",
    "saying": "every spell has its price; a kind heart opens any door; never trust an apple from a "
    "stranger; a promise to a frog is still a promise; wishes come in threes; even a dragon must sleep",
    "quiet": "a sleeping castle; falling snow; a mouse in a church; a spell at midnight",
    "time": "before cockcrow; at the stroke of twelve; on the seventh day; on midsummer night; by the full moon",
}

SPACE = {
    "men": "Ensign Okoro > Okoro; Idris Okoro > Okoro",
    "women": "Commander Vega > Vega; Commander Zara Vega > Vega",
    "room": "the airlock; the engine room; the control room; the cargo bay; the medical bay; the "
    "observation dome; the cryo chamber; the reactor core",
    "ground": "the hangar deck; the crater; the landing field; the red dust of the planet; the docking ring; the hull",
    "goal": "the third moon; the orbital station; the derelict ship; the jump gate; Kepler Colony; the "
    "asteroid belt; the alien ruins",
    "thing": "scanner; oxygen mask; data crystal; wrench; circuit board; distress beacon; fuel cell; "
    "translator; star chart; hologram; power cable; tablet",
    "prize": "the alien artifact; the last fuel cell; the ship's black box; the signal from Kepler; the "
    "quantum core; the memory of the probe; the code for the jump gate",
    "weapon": "blaster; plasma rifle; stun pistol; laser cutter; pulse gun; shock baton",
    "drink": "recycled water; synthetic coffee; station vodka; nutrient gel; algae tea",
    "clothes": "pressure suit; flight jacket; thermal suit; fleet uniform",
    "seat": "console; pilot's chair; cryo pod; supply crate; navigation panel",
    "ride": "shuttle; escape pod; moon rover; freighter; scout ship",
    "light": "warning light; console; hologram; emergency lamp; reactor glow",
    "beast": "maintenance robot; repair drone; lab clone; alien larva",
    "sound": "an alarm; the hum of the reactor; static on the radio; the hiss of the airlock; a "
    "countdown; the ping of the scanner; the whine of the engines",
    "sight": "a ring of dead satellites; the blue curve of a planet; an alien ship on the screen; a "
    "field of asteroids; a row of empty cryo pods; a light between the stars",
    "smell": "hot metal; ozone; recycled air; coolant; burnt circuits; plastic and oxygen",
    "weather": "the stars did not blink; a meteor shower lit the hull; the planet turned slowly below; "
    "the solar wind was rising; two moons hung in a green sky; there was only vacuum",
    "role": "the ship's computer; the chief engineer; the android; the medic; the navigator; the "
    "science officer; the alien envoy",
    "foe": "the admiral of the fleet; the rogue android; the alien queen; the mining boss; the "
    "warlord of Titan; the false captain; the thing in the cargo bay",
    "group": "the colony patrol; the androids; the aliens; the fleet marines; the asteroid miners",
    "trade": "pilot; engineer; xenobiologist; asteroid miner; cargo captain; robot mechanic",
    "address": "commander; pilot; crewman; human",
    "oath": "Stars above; Holy nebula; Great galaxies; By the moons of Titan",
    "news": "the reactor is failing; there is something alive in the cargo bay; the signal is not "
    "human; we are losing oxygen; the jump gate is closed; the crew of the probe never woke up; the "
    "asteroid has changed its course",
    "plan": "reach the orbital station; repair the hyperdrive; decode the alien signal; wake the crew; "
    "land on the third moon; get the shields back online; rescue the miners; shut down the reactor",
    "memory": "the crash on Titan; the first contact; the long cryo sleep; the silence of "
    "the colony; the last day on Earth",
    "cover": "the cargo crates; the bulkhead; the console; a fuel tank; the wreck of the rover; a cryo pod",
    "pay": "nine hundred credits; a can of fuel; a bottle of oxygen; a freighter ticket; forty grams of iridium",
    "saying": "space does not forgive; oxygen first, questions later; never open an airlock for a "
    "stranger; every light out there is already old; a computer only lies when it is told to; gravity "
    "always wins",
    "quiet": "deep space; a dead satellite; an empty cryo pod; the far side of the moon",
    "time": "at the end of the third watch; in zero gravity; before the next jump; on the ninth day in "
    "orbit; at 0400 ship time",
}

WESTERN = {
    "men": "Wade Dawson > Dawson; Sheriff Dawson > Dawson",
    "women": "Josie McCready > Josie; Miss Josie McCready > Josie",
    "room": "the saloon; the sheriff's office; the livery stable; the jailhouse; the bunkhouse; the "
    "general store; the bank; the barber shop",
    "ground": "the dusty street; the corral; the prairie; the dry creek; the railroad tracks; the canyon floor",
    "goal": "Red Mesa; the silver mine; the Calloway ranch; Abilene; the Rio Grande; the hanging tree; Dry Gulch",
    "thing": "deputy's badge; lasso; saddlebag; tobacco pouch; wanted poster; pocket watch; harmonica; "
    "horseshoe; canteen; deck of cards; branding iron; telegram",
    "prize": "the railroad payroll; the deed to the ranch; the silver from the mine; the marshal's "
    "silver star; the Wells Fargo strongbox; the bounty; the gold claim",
    "weapon": "six-shooter; Winchester rifle; shotgun; Colt; bowie knife; bullwhip",
    "drink": "whiskey; red-eye; campfire coffee; sarsaparilla; warm beer",
    "clothes": "duster; leather vest; saddle blanket; poncho",
    "seat": "saloon bar; saddle; feed barrel; card table; poker table",
    "ride": "stagecoach; covered wagon; wagon; freight train; buckboard",
    "light": "oil lamp; campfire; lantern; branding fire; candle",
    "beast": "horse; coyote; mule; longhorn; hound",
    "sound": "a coyote; a gunshot; the jingle of spurs; a banjo; hoofbeats; the whistle of the noon "
    "train; a rattlesnake",
    "sight": "a cloud of dust on the trail; buzzards over the canyon; six riders on the ridge; a grave "
    "on the hill; smoke over the ranch; an empty saddle",
    "smell": "whiskey and sawdust; horses; dust and leather; sagebrush; gun oil; campfire smoke",
    "weather": "tumbleweeds rolled down the street; the sun beat down on the prairie; the wind blew "
    "dust against the shutters; the desert shimmered; a dust storm was coming over the mesa; the cattle "
    "were restless",
    "role": "the barkeep; the undertaker; the blacksmith; the piano player; the stage driver; the "
    "preacher; the telegraph man",
    "foe": "Black Bart Calloway; the cattle baron; the hired gun; the crooked sheriff; the horse thief; "
    "the railroad man; the youngest of the Harker gang",
    "group": "the posse; the Harker gang; the rustlers; the ranch hands; the bounty hunters",
    "trade": "ranch hand; bounty hunter; deputy; rancher; gunslinger; cattle driver",
    "address": "partner; sheriff; stranger; cowpoke",
    "oath": "Well, I'll be; Tarnation; Great horned toads; Dang it",
    "news": "the bank was robbed; the Harker gang is in town; somebody cut the telegraph wire; the herd "
    "is gone; there is a price on your head; the well ran dry; they are hanging the wrong man at noon",
    "plan": "bring the herd to Abilene; catch the horse thief; stop the hanging; save the ranch; ride "
    "down the Harker gang; guard the payroll; settle the score with the cattle baron; get out of Dry "
    "Gulch alive",
    "memory": "the shootout at Dry Gulch; the winter the cattle died; the old days on the trail; the "
    "hanging at Red Mesa; the funeral on the prairie",
    "cover": "the horse trough; a wagon; the saloon bar; a boulder; the hay bales; the stable door",
    "pay": "fifty silver dollars; two gold watches; a bag of nuggets; a month's wages; a poke of gold dust",
    "saying": "a fast horse beats a slow apology; a man is only as good as his word; the desert keeps "
    "what it gets; never draw unless you mean it; trouble always rides in from the south; the law is a "
    "long way from here",
    "quiet": "a graveyard; a ghost town; the prairie before a storm; a church on poker night",
    "time": "at high noon; at sundown; before the noon train; on the third day on the trail; after the last dance",
}

GENRES = ("noir", "pirate", "fairytale", "space", "western")


def _entries(lexicon: Dict[str, str]) -> Dict[str, List[str]]:
    return {slot: phrases.split("; ") for slot, phrases in lexicon.items()}


LEXICON = {genre: _entries(lexicon) for genre, lexicon in zip(GENRES, (NOIR, PIRATE, FAIRY, SPACE, WESTERN))}

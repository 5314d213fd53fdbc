"""The word lists of the stories: everything that a narrator may choose freely."""

from itertools import product


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(",") if word.strip())


def _compounds(stems: str, endings: str) -> tuple[str, ...]:
    """Names such as Ashcombe and Foxley: every stem with every ending, unless the stem ends in the
    ending's first letter."""
    pairs = product(_listed(stems), _listed(endings))
    return tuple(stem + ending for stem, ending in pairs if stem[-1] != ending[0])


WOMEN = _listed("""
    Abigail, Adela, Agnes, Alba, Alina, Anneke, Astrid, Augusta, Beatrix, Berta, Bettina, Birgit,
    Blythe, Camilla, Carmen, Celeste, Clara, Clementine, Dagny, Daphne, Delphine, Dora, Edith,
    Eleanor, Elfrida, Eliza, Ellen, Elsie, Eudora, Felicity, Fiona, Flora, Freya, Gemma, Gerda,
    Gudrun, Gwendolen, Hanna, Hedwig, Helga, Henrietta, Hilda, Honor, Imogen, Ingrid, Irene,
    Isolde, Jemima, Johanna, Juno, Katya, Lavinia, Leonora, Lettice, Linnea, Lotte, Louisa, Magda,
    Marguerite, Martha, Maud, Millicent, Moira, Nadia, Nora, Odile, Ottilie, Petra, Philippa,
    Prudence, Ramona, Rosalind, Ruth, Selma, Sigrid, Sybil, Tabitha, Tamsin, Thea, Vera
""")
MEN = _listed("""
    Aaron, Alaric, Albert, Alfred, Ambrose, Anselm, Anton, Arne, Arthur, Aubrey, August,
    Bartholomew, Basil, Benedict, Bruno, Caspar, Cedric, Chester, Clement, Conrad, Cuthbert, Cyril,
    Desmond, Diego, Edgar, Elias, Enoch, Erasmus, Ernest, Ezra, Fabian, Felix, Fergus, Franz,
    Gareth, Gideon, Gilbert, Godfrey, Gustav, Harold, Hector, Henrik, Horace, Hugo, Ignatius,
    Isidore, Ivo, Jerome, Jonas, Julius, Klaus, Laurence, Leander, Lorenzo, Lucian, Ludwig, Magnus,
    Malachi, Matthias, Maurice, Maximilian, Moses, Nicodemus, Odo, Olaf, Orlando, Oscar, Otto,
    Percival, Phineas, Ralph, Reginald, Rodrigo, Rufus, Sebastian, Silas, Tarquin, Thaddeus, Ulric
""")
WRITERS = _listed("""
    Abel, Agatha, Amara, Archibald, Barnaby, Bianca, Boris, Cecily, Cordelia, Damian, Dmitri,
    Edmund, Emil, Esther, Fenna, Gabriel, Gaston, Gregor, Harriet, Herbert, Hubert, Igor, Jasper,
    Josephine, Keziah, Leopold, Linus, Mabel, Matilda, Minna, Nathaniel, Niels, Osbert, Patience,
    Quentin, Sabine, Sidonie, Theodore, Ursula, Valentin
""")

PLACES = _compounds(
    """Alder, Apple, Ash, Bram, Brook, Cold, Crow, Dun, Elm, Fern, Fox, Gar, Hazel, Heath, Kes, Lang,
    Mar, Nether, Oak, Pen, Raven, Sedge, Thorn, Win""",
    "bury, combe, ford, ham, leigh, mere, stead, wick, worth",
)
SURNAMES = _compounds(
    """Arrow, Barley, Bell, Birch, Blythe, Bright, Butter, Candle, Copper, Feather, Fisher, Glover,
    Hart, Honey, Lamb, Merry, Nettle, Penny, Pepper, Quill, Silver, Summer, Tanner, Thistle, Winter""",
    "field, man, well",
)
ISLES = _listed("""
    Aldabar, Anstruva, Borrasay, Brindisay, Corvina, Drumlin, Eldermoor, Farraday, Galanta,
    Gorsehead, Halvard, Hesperia, Illyra, Kalamar, Kittiwake Head, Lorimer, Malverna, Marazan,
    Obanga, Palmarosa, Pentland, Rathmore, Rosmarin, Santorra, Solander, Tamarinda, Torvald,
    Valdemar, Vigoria, Yarrowby
""")
STREETS = _listed("""
    Abbey, Almond, Bakehouse, Beacon, Bishop, Bridge, Canal, Castle, Chapel, Crescent, Dockside,
    Eastgate, Fountain, Garrison, Guildhall, Hatter, Juniper, Leather, Mercer, Mulberry, Orchard,
    Paternoster, Pilgrim, Regent, Saddler, Station, Theatre, Turnpike, Vinegar, Windmill
""")

TRADES = _listed("""
    apothecary, archer, astronomer, baker, banker, barber, basketmaker, beekeeper, blacksmith,
    bookbinder, brewer, bricklayer, butcher, carpenter, cartwright, cheesemonger, chimney sweep,
    clockmaker, clown, cobbler, cook, cooper, dancer, dentist, drummer, dyer, engraver, falconer,
    farmer, ferryman, fiddler, fisher, fletcher, glassblower, goldsmith, grocer, hatmaker,
    innkeeper, joiner, juggler, lamplighter, lighthouse keeper, locksmith, magician, mapmaker,
    mason, midwife, miller, musician, nurse, painter, papermaker, pedlar, piper, plumber, poet,
    porter, postman, potter, printer, saddler, schoolteacher, scribe, sculptor, shepherd,
    shipwright, singer, soldier, stonecutter, surveyor, tailor, tanner, thatcher, tinker, toymaker,
    umbrella mender, vintner, weaver, wheelwright, woodcutter
""")
THINGS = _listed("""
    anklet, bangle, bell, box, bracelet, brooch, bucket, buckle, bugle, button, candlestick, chain,
    chalice, clock, coin, comb, compass, crown, cup, dagger, drum, flask, flute, goblet, hairpin,
    hatchet, helmet, hook, inkwell, jug, kettle, key, ladle, lamp, lantern, locket, medal, mirror,
    needle, padlock, pendant, pitcher, ring, saddle, saucepan, shield, snuffbox, spoon, sword,
    tankard, teapot, telescope, thimble, tiara, trinket, trumpet, watch, whistle
""")
LOOKS = _listed("""
    amber, ancient, antique, battered, beautiful, blue, brass, bronze, copper, crooked, curious,
    dented, elegant, enamelled, engraved, foreign, gilded, golden, green, handsome, heavy, humble,
    iron, ivory, jade, lopsided, magnificent, modest, odd, old, ornate, painted, patched, pewter,
    plain, polished, precious, purple, red, rusty, scarlet, scratched, shiny, silver, simple, slender,
    sparkling, speckled, splendid, striped, tarnished, tin, tiny, turquoise, ugly, violet, white,
    wonderful, worn, yellow
""")
ANIMALS = _listed("""
    antelope, armadillo, badger, bat, beaver, beetle, bison, blackbird, bullfinch, butterfly,
    camel, cat, chaffinch, chipmunk, cockerel, cormorant, cricket, crow, cuckoo, donkey, dormouse,
    dragonfly, duck, eagle, falcon, ferret, fox, frog, giraffe, goat, goose, grasshopper, hamster,
    hare, hawk, hedgehog, heron, hornet, jackdaw, kangaroo, kestrel, kingfisher, leopard, lizard,
    lynx, magpie, marmot, mole, monkey, moth, mouse, newt, nightingale, osprey, ostrich, otter,
    owl, panther, parrot, peacock, pelican, pheasant, pigeon, pony, porcupine, puffin, quail,
    rabbit, raven, robin, rook, salamander, seagull, snail, sparrow, spider, squirrel, stoat,
    stork, swallow, swan, terrapin, thrush, toad, tortoise, vole, weasel, woodpecker, wren, zebra
""")
WEATHERS = _listed("""
    blustery, breathless, bright, calm, clear, cloudless, cloudy, crisp, damp, dismal, drizzly, dull,
    foggy, fresh, gentle, gloomy, glorious, grey, gusty, hazy, lovely, mild, misty, moonlit, pale,
    peaceful, quiet, rainy, showery, silent, soggy, starry, still, stormy, strange, thundery, warm,
    wet, wild, windy
""")
SEASONS = ("spring", "summer", "autumn", "winter")
DAYS = _listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
NUMBERS = _listed("""
    two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen,
    fifteen, sixteen, seventeen, eighteen, nineteen, twenty, thirty, forty, fifty, sixty, seventy,
    eighty, ninety
""")

FOODS = _listed("""
    almond biscuits, apple pie, apricot jam, asparagus, bacon, baked beans, barley soup, blackberry
    tart, bread and butter, broth, buttermilk, cabbage rolls, candied ginger, caramel, cauliflower
    cheese, cherries, chestnuts, chicken stew, chocolate, cinnamon buns, cold mutton, crumpets,
    cucumber salad, custard, dumplings, fig rolls, fishcakes, fried eggs, fudge, gingerbread,
    gooseberry fool, ham, herrings, honeycomb, hot porridge, kippers, lemon curd, lentils, liquorice,
    macaroons, marmalade, marzipan, meatballs, melon, mushroom pie, mussels, noodles, nougat, oatcakes,
    olives, omelette, onion tart, pancakes, peaches, peppermints, pickled walnuts, pineapple, plum
    cake, popcorn, potato salad, raisins, ravioli, rhubarb crumble, rice pudding, roast goose, sausages,
    seed cake, shortbread, smoked trout, sponge cake, strawberries, toast, toffee, treacle, trifle,
    turnip mash, vanilla ice, waffles, watercress
""")
GIFTS = _listed("""
    accordion, acorn, almanac, anvil, armchair, atlas, bagpipe, banjo, barometer, basket, blanket,
    bonnet, bookcase, bow tie, broom, calendar, canoe, cardigan, carpet, cello, chessboard, cloak,
    cushion, dictionary, doll, easel, feather duster, fiddle, fishing rod, footstool, gong, hammock,
    harmonica, harp, hatbox, jacket, jigsaw, kite, ladder, lute, magnet, mandolin, mattress,
    microscope, muffler, napkin, necktie, notebook, oboe, paintbrush, parasol, penknife, petticoat,
    piano, pillow, pincushion, puppet, quilt, raincoat, rocking horse, rucksack, sandal, saxophone,
    scarf, shawl, sledge, slipper, spinning top, suitcase, tambourine, tent, thermometer, toolbox,
    tricycle, tuba, umbrella, velvet hat, violin, waistcoat, wheelbarrow, xylophone, yo-yo, zither
""")
NOOKS = _listed("""
    altar, arch, attic stairs, balcony, bandstand, barn, bathtub, beehive, bench, boathouse, boiler,
    bookshelf, bridge, cabinet, cart, cellar door, chicken coop, chimney, church steps, cupboard,
    curtain, dovecote, dresser, engine, fence, fireplace, flagpole, floorboard, fountain, gatepost,
    gramophone, grandstand, greenhouse, hayloft, hedge, henhouse, jetty, kennel, larder, letterbox,
    lighthouse, manger, milestone, mill, monument, oven, pavilion, pier, platform, pulpit, pump,
    rain barrel, rockery, rooftop, scaffold, scarecrow, shed, signpost, sofa, stable, staircase,
    statue, stove, sundial, tower, trapdoor, trough, tunnel, wardrobe, washing line, waterwheel, well,
    woodpile, workbench
""")

BIRDS = _listed("""
    Albatross, Avocet, Bustard, Buzzard, Condor, Crane, Dove, Egret, Finch, Flamingo, Goshawk,
    Grebe, Harrier, Ibis, Kite, Lapwing, Linnet, Mallard, Nightjar, Nuthatch, Partridge, Petrel,
    Ptarmigan, Redstart, Shearwater, Skua, Starling, Swift, Tern, Warbler
""")
TEMPERS = _listed("""
    Able, Bashful, Brave, Cheerful, Clever, Dancing, Eager, Faithful, Fickle, Forgiving, Frantic,
    Grateful, Happy, Haughty, Idle, Jealous, Jolly, Lazy, Loyal, Lucky, Nimble, Patient, Pensive,
    Reckless, Singing, Sleepy, Stubborn, Tireless, Wandering, Whistling
""")
CARGOES = _listed("""
    alum, aniseed, bamboo, bricks, cardamom, charcoal, coal, coconuts, cotton, ebony, figs, furs,
    gherkins, hemp, hides, lace, maize, mangoes, muslin, nails, paprika, pepper, porcelain,
    quinine, rum, sandalwood, slate, sulphur, tallow, timber, tobacco, varnish
""")
SEA_BEASTS = _listed("""
    barracuda, cod, crab, cuttlefish, dolphin, flounder, halibut, herring, kraken, lobster,
    manatee, manta ray, mermaid, monkfish, octopus, penguin, pilot whale, porpoise, sailfish,
    sardine, sea cow, sea lion, sea urchin, shrimp, sperm whale, starfish, sturgeon, swordfish,
    tuna, turtle
""")

CLUES = _listed("""
    apron, bandage, banknote, beret, bottle, bus ticket, candle, cigar, corkscrew, cravat, earring,
    envelope, eyeglass, footprint, fork, glove, handkerchief, hatpin, ink blot, keyhole, library
    card, magnifying glass, matchbox, monocle, moustache, newspaper, pawn ticket, pipe, playing
    card, postcard, purse, receipt, rosette, saucer, scissors case, sock, spanner, stocking,
    toothpick, train ticket, typewriter, wallet, walking stick, wig
""")
COLOURS = _listed("""
    auburn, azure, black, brown, buff, chestnut, crimson, emerald, fawn, hazel, indigo, lemon,
    magenta, maroon, mustard, navy, orange, peach, primrose, ruby, russet, sepia, tan, topaz
""")

FLOWERS = _listed("""
    anemones, asters, begonias, bluebells, camellias, carnations, chrysanthemums, cornflowers,
    cowslips, cyclamens, daisies, dandelions, foxgloves, freesias, gentians, gladioli, harebells,
    hollyhocks, honeysuckles, hydrangeas, jasmines, larkspurs, lobelias, lupins, marigolds,
    orchids, oxlips, peonies, petunias, poppies, ranunculi, rhododendrons, salvias, saxifrages,
    snowdrops, sunflowers, sweet peas, verbenas, violets, wisterias
""")
VEGETABLES = _listed("""
    artichokes, aubergines, broad beans, brussels sprouts, capers, carrots, celeriacs, chicories,
    chillies, cucumbers, endives, garlics, gourds, kales, leeks, lettuces, mushrooms, onions,
    peppers, potatoes, radishes, redcurrants, runner beans, spinach, squashes, sweetcorn, tomatoes,
    turnips
""")
TREES = _listed("""
    acacia, alder, apricot, aspen, beech, birch, cedar, cherry, chestnut, cypress, damson, elder, elm,
    eucalyptus, fig, fir, ginkgo, hawthorn, hazel, hickory, holly, hornbeam, larch, laurel, lime,
    maple, medlar, mulberry, oak, palm, pear, persimmon, pine, plane, plum, poplar, quince, redwood,
    rowan, spruce, sycamore, walnut, willow, yew
""")
TOOLS = _listed("""
    axe, billhook, bucket, dibber, edger, flowerpot, funnel, hoe, lawnmower, mattock, pickaxe,
    pitchfork, riddle, scythe, seed drill, sickle, spade, sprinkler, trowel, watering can
""")

LISTS = {
    "hero": WOMEN + MEN,
    "writer": WRITERS,
    "place": PLACES,
    "surname": SURNAMES,
    "isle": ISLES,
    "street": STREETS,
    "trade": TRADES,
    "look": LOOKS,
    "thing": THINGS,
    "animal": ANIMALS,
    "weather": WEATHERS,
    "season": SEASONS,
    "day": DAYS,
    "number": NUMBERS,
    "house": NUMBERS,
    "food": FOODS,
    "gift": GIFTS,
    "nook": NOOKS,
    "bird": BIRDS,
    "temper": TEMPERS,
    "cargo": CARGOES,
    "beast": SEA_BEASTS,
    "clue": CLUES,
    "colour": COLOURS,
    "flowers": FLOWERS,
    "blooms": FLOWERS,
    "vegetables": VEGETABLES,
    "tree": TREES,
    "tool": TOOLS,
}
"""The options of each slot that the narrators share."""
